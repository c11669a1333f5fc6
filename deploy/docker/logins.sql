-- The logins beside the owner's: the daemon's, which may add ticks, a relay's, which may serve them, and Grafana's, which
-- may read the market.
-- Can be repeated: a changed secret becomes the password.
\set ON_ERROR_STOP on
\set writer_password `cat /run/secrets/writer-password`
\set reader_password `cat /run/secrets/reader-password`
\set relay_password `cat /run/secrets/relay-password`
SELECT 'CREATE ROLE ingestor LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'ingestor') \gexec
SELECT 'CREATE ROLE grafana LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'grafana') \gexec
SELECT 'CREATE ROLE relay LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'relay') \gexec
ALTER ROLE ingestor PASSWORD :'writer_password';
ALTER ROLE grafana PASSWORD :'reader_password';
ALTER ROLE relay PASSWORD :'relay_password';
GRANT market_write TO ingestor;
GRANT market_relay TO relay;
GRANT market_read TO grafana;
ALTER ROLE grafana SET default_transaction_read_only = on;
ALTER ROLE grafana SET statement_timeout = '60s';
