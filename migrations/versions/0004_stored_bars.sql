-- The tables of revision 0004, the same in every edition. Frozen, as those before it.

CREATE TABLE ingest.rollup_1m (
    symbol TEXT NOT NULL,
    time TIMESTAMP WITH TIME ZONE NOT NULL,
    open DOUBLE PRECISION NOT NULL,
    high DOUBLE PRECISION NOT NULL,
    low DOUBLE PRECISION NOT NULL,
    close DOUBLE PRECISION NOT NULL,
    volume BIGINT NOT NULL,
    turnover DOUBLE PRECISION NOT NULL,
    ticks BIGINT NOT NULL,
    first_at TIMESTAMP WITH TIME ZONE NOT NULL,
    last_at TIMESTAMP WITH TIME ZONE NOT NULL,
    last_received_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT rollup_1m_pkey PRIMARY KEY (symbol, time)
);

COMMENT ON TABLE ingest.rollup_1m IS 'Stored one-minute bars, read through market.ohlcv_1m. They outlive their ticks.';

CREATE TABLE ingest.rollup_5m (
    LIKE ingest.rollup_1m,
    CONSTRAINT rollup_5m_pkey PRIMARY KEY (symbol, time)
);

COMMENT ON TABLE ingest.rollup_5m IS 'Stored five-minute bars, read through market.ohlcv_5m.';

CREATE TABLE ingest.rollup_1h (
    LIKE ingest.rollup_1m,
    CONSTRAINT rollup_1h_pkey PRIMARY KEY (symbol, time)
);

COMMENT ON TABLE ingest.rollup_1h IS 'Stored one-hour bars, read through market.ohlcv_1h.';

CREATE TABLE ingest.rollup_1d (
    LIKE ingest.rollup_1m,
    CONSTRAINT rollup_1d_pkey PRIMARY KEY (symbol, time)
);

COMMENT ON TABLE ingest.rollup_1d IS 'Stored bars of the exchange''s days, read through market.ohlcv_1d.';

-- Bars are inserted in the order of time, so these take kilobytes.
CREATE INDEX rollup_1m_time_idx ON ingest.rollup_1m USING brin (time) WITH (autosummarize = on);

CREATE INDEX rollup_5m_time_idx ON ingest.rollup_5m USING brin (time) WITH (autosummarize = on);

CREATE INDEX rollup_1h_time_idx ON ingest.rollup_1h USING brin (time) WITH (autosummarize = on);

CREATE TABLE ingest.rollup_state (
    id BOOLEAN DEFAULT true NOT NULL,
    announced_until TIMESTAMP WITH TIME ZONE DEFAULT '0001-01-01 00:00:00+00' NOT NULL,
    until_1m TIMESTAMP WITH TIME ZONE DEFAULT '0001-01-01 00:00:00+00' NOT NULL,
    until_5m TIMESTAMP WITH TIME ZONE DEFAULT '0001-01-01 00:00:00+00' NOT NULL,
    until_1h TIMESTAMP WITH TIME ZONE DEFAULT '0001-01-01 00:00:00+00' NOT NULL,
    until_1d TIMESTAMP WITH TIME ZONE DEFAULT '0001-01-01 00:00:00+00' NOT NULL,
    CONSTRAINT rollup_state_pkey PRIMARY KEY (id),
    CONSTRAINT rollup_state_id_check CHECK (id),
    CONSTRAINT rollup_state_announced_check CHECK (until_1m <= announced_until)
);

COMMENT ON TABLE ingest.rollup_state IS 'How far bars are stored. One row.';
COMMENT ON COLUMN ingest.rollup_state.id IS 'There is one row.';
COMMENT ON COLUMN ingest.rollup_state.announced_until IS 'A writer puts the bars of older ticks on the list of stale bars.';
COMMENT ON COLUMN ingest.rollup_state.until_1m IS 'The one-minute bars before this are stored.';
COMMENT ON COLUMN ingest.rollup_state.until_5m IS 'The five-minute bars before this are stored.';
COMMENT ON COLUMN ingest.rollup_state.until_1h IS 'The one-hour bars before this are stored.';
COMMENT ON COLUMN ingest.rollup_state.until_1d IS 'The bars of days before this are stored.';

INSERT INTO ingest.rollup_state DEFAULT VALUES;

DROP TABLE ingest.stale_ranges;

CREATE TABLE ingest.stale_bars (
    symbol TEXT NOT NULL,
    time TIMESTAMP WITH TIME ZONE NOT NULL,
    noted_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT stale_bars_pkey PRIMARY KEY (symbol, time)
);

COMMENT ON TABLE ingest.stale_bars IS 'Minutes into which ticks came after their bars were stored. Views compute these bars from ticks until they are repaired.';
COMMENT ON COLUMN ingest.stale_bars.symbol IS 'The exchange''s symbol with its suffix.';
COMMENT ON COLUMN ingest.stale_bars.time IS 'Start of the minute.';
COMMENT ON COLUMN ingest.stale_bars.noted_at IS 'When the last of the ticks came.'
