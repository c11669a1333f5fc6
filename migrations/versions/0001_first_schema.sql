-- The tables of revision 0001, frozen here: later revisions change them, this file never.

CREATE TABLE market.ticks (
    time TIMESTAMP WITH TIME ZONE NOT NULL,
    received_at TIMESTAMP WITH TIME ZONE NOT NULL,
    price DOUBLE PRECISION NOT NULL,
    volume BIGINT NOT NULL,
    occurrence INTEGER NOT NULL,
    symbol TEXT NOT NULL,
    CONSTRAINT ticks_symbol_time_price_volume_occurrence_key UNIQUE (symbol, time, price, volume, occurrence)
){partitioning};

COMMENT ON TABLE market.ticks IS 'Every trade that was received, exactly once.';
COMMENT ON COLUMN market.ticks.time IS 'When the trade happened, by the exchange''s clock, which has whole seconds.';
COMMENT ON COLUMN market.ticks.received_at IS 'When the message arrived here; orders the trades within a second.';
COMMENT ON COLUMN market.ticks.price IS 'Price of one unit, in the symbol''s currency, as it was sent.';
COMMENT ON COLUMN market.ticks.volume IS 'Units traded.';
COMMENT ON COLUMN market.ticks.occurrence IS '1 for the first, 2 for the second … of equal trades in the same second.';
COMMENT ON COLUMN market.ticks.symbol IS 'The exchange''s symbol with its suffix, such as AIR.NZ.';

CREATE TABLE market.instruments (
    symbol TEXT NOT NULL,
    exchange TEXT NOT NULL,
    company_name TEXT,
    industry TEXT,
    uuid UUID,
    active BOOLEAN,
    first_seen TIMESTAMP WITH TIME ZONE,
    last_seen TIMESTAMP WITH TIME ZONE,
    CONSTRAINT instruments_pkey PRIMARY KEY (symbol)
);

COMMENT ON TABLE market.instruments IS 'The traded instruments.';
COMMENT ON COLUMN market.instruments.symbol IS 'The exchange''s symbol with its suffix.';
COMMENT ON COLUMN market.instruments.exchange IS 'The exchange, such as nzx.';
COMMENT ON COLUMN market.instruments.company_name IS 'Name of the issuer.';
COMMENT ON COLUMN market.instruments.industry IS 'Industry, in the provider''s words.';
COMMENT ON COLUMN market.instruments.uuid IS 'The provider''s id of the instrument.';
COMMENT ON COLUMN market.instruments.active IS 'Whether the provider lists it as active.';
COMMENT ON COLUMN market.instruments.first_seen IS 'Time of the first tick.';
COMMENT ON COLUMN market.instruments.last_seen IS 'Time of the last tick.';

CREATE TABLE market.bars (
    symbol TEXT NOT NULL,
    time TIMESTAMP WITH TIME ZONE NOT NULL,
    resolution INTERVAL NOT NULL,
    open DOUBLE PRECISION NOT NULL,
    high DOUBLE PRECISION NOT NULL,
    low DOUBLE PRECISION NOT NULL,
    close DOUBLE PRECISION NOT NULL,
    volume BIGINT NOT NULL,
    source TEXT NOT NULL,
    fetched_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT bars_pkey PRIMARY KEY (symbol, resolution, time)
);

COMMENT ON TABLE market.bars IS 'Bars fetched from the provider''s REST API, for the minutes that are not covered.';
COMMENT ON COLUMN market.bars.symbol IS 'The exchange''s symbol with its suffix.';
COMMENT ON COLUMN market.bars.time IS 'Start of the bar.';
COMMENT ON COLUMN market.bars.resolution IS 'Length of the bar.';
COMMENT ON COLUMN market.bars.open IS 'First price.';
COMMENT ON COLUMN market.bars.high IS 'Highest price.';
COMMENT ON COLUMN market.bars.low IS 'Lowest price.';
COMMENT ON COLUMN market.bars.close IS 'Last price.';
COMMENT ON COLUMN market.bars.volume IS 'Units traded.';
COMMENT ON COLUMN market.bars.source IS 'The provider of the bar.';
COMMENT ON COLUMN market.bars.fetched_at IS 'When it was fetched.';

CREATE TABLE ingest.stream_sessions (
    id UUID NOT NULL,
    instance TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    connected_at TIMESTAMP WITH TIME ZONE NOT NULL,
    kind TEXT DEFAULT 'stream' NOT NULL,
    authenticated_at TIMESTAMP WITH TIME ZONE,
    covered_until TIMESTAMP WITH TIME ZONE,
    last_message_at TIMESTAMP WITH TIME ZONE,
    last_tick_at TIMESTAMP WITH TIME ZONE,
    last_seen_at TIMESTAMP WITH TIME ZONE,
    last_batch BIGINT DEFAULT 0 NOT NULL,
    last_batch_messages BIGINT,
    ended_at TIMESTAMP WITH TIME ZONE,
    end_reason TEXT,
    close_code INTEGER,
    ticks BIGINT DEFAULT 0 NOT NULL,
    rejected BIGINT DEFAULT 0 NOT NULL,
    duplicates BIGINT DEFAULT 0 NOT NULL,
    CONSTRAINT stream_sessions_pkey PRIMARY KEY (id),
    CONSTRAINT stream_sessions_kind_check CHECK (kind IN ('stream', 'replay'))
);

CREATE INDEX stream_sessions_connected_at_idx ON ingest.stream_sessions (connected_at);

COMMENT ON TABLE ingest.stream_sessions IS 'Each connection to the feed and each replay. Coverage is computed from these rows.';
COMMENT ON COLUMN ingest.stream_sessions.id IS 'Made by the daemon (UUIDv7), so that a session can begin while the database is unavailable.';
COMMENT ON COLUMN ingest.stream_sessions.instance IS 'Which daemon it was.';
COMMENT ON COLUMN ingest.stream_sessions.endpoint IS 'The stream''s address; of a replay, the file''s name.';
COMMENT ON COLUMN ingest.stream_sessions.connected_at IS 'When the connection was open.';
COMMENT ON COLUMN ingest.stream_sessions.kind IS 'stream or replay; only a stream covers.';
COMMENT ON COLUMN ingest.stream_sessions.authenticated_at IS 'When the server accepted the token; coverage begins here.';
COMMENT ON COLUMN ingest.stream_sessions.covered_until IS 'All ticks before this were received; null: not proved. Never later than the database''s clock.';
COMMENT ON COLUMN ingest.stream_sessions.last_message_at IS 'Arrival of the last message.';
COMMENT ON COLUMN ingest.stream_sessions.last_tick_at IS 'Arrival of the last message that was a tick.';
COMMENT ON COLUMN ingest.stream_sessions.last_seen_at IS 'When its own process last wrote here, by the database''s clock: it is alive for a minute after that. Null: never.';
COMMENT ON COLUMN ingest.stream_sessions.last_batch IS 'Number of the last committed batch: it makes each one count once.';
COMMENT ON COLUMN ingest.stream_sessions.last_batch_messages IS 'Messages of that batch that are committed, while it is written in parts; null: all.';
COMMENT ON COLUMN ingest.stream_sessions.ended_at IS 'When it ended; null while it lives.';
COMMENT ON COLUMN ingest.stream_sessions.end_reason IS 'Why it ended, from a fixed list.';
COMMENT ON COLUMN ingest.stream_sessions.close_code IS 'The WebSocket''s close code, where there was one.';
COMMENT ON COLUMN ingest.stream_sessions.ticks IS 'Ticks committed, duplicates included.';
COMMENT ON COLUMN ingest.stream_sessions.rejected IS 'Messages kept in ingest.rejected_messages.';
COMMENT ON COLUMN ingest.stream_sessions.duplicates IS 'Ticks that were in the table already.';

CREATE TABLE ingest.rejected_messages (
    session_id UUID NOT NULL,
    batch BIGINT NOT NULL,
    position INTEGER NOT NULL,
    received_at TIMESTAMP WITH TIME ZONE NOT NULL,
    reason TEXT NOT NULL,
    raw BYTEA NOT NULL,
    raw_bytes INTEGER NOT NULL,
    CONSTRAINT rejected_messages_pkey PRIMARY KEY (session_id, batch, position)
);

CREATE INDEX rejected_messages_received_at_idx ON ingest.rejected_messages (received_at);

COMMENT ON TABLE ingest.rejected_messages IS 'Messages that could not be stored as ticks: nothing is dropped in silence.';
COMMENT ON COLUMN ingest.rejected_messages.session_id IS 'The session that received it.';
COMMENT ON COLUMN ingest.rejected_messages.batch IS 'The batch that brought it.';
COMMENT ON COLUMN ingest.rejected_messages.position IS 'Its place among the batch''s messages, from 1.';
COMMENT ON COLUMN ingest.rejected_messages.received_at IS 'When it arrived.';
COMMENT ON COLUMN ingest.rejected_messages.reason IS 'Why it is not a tick, from a fixed list.';
COMMENT ON COLUMN ingest.rejected_messages.raw IS 'Its first 64 KiB.';
COMMENT ON COLUMN ingest.rejected_messages.raw_bytes IS 'Its full size in bytes.';

CREATE TABLE ingest.trading_sessions (
    calendar TEXT NOT NULL,
    trading_day DATE NOT NULL,
    opens_at TIMESTAMP WITH TIME ZONE NOT NULL,
    closes_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT trading_sessions_pkey PRIMARY KEY (calendar, trading_day),
    CONSTRAINT trading_sessions_order_check CHECK (opens_at < closes_at),
    CONSTRAINT trading_sessions_length_check CHECK (closes_at <= opens_at + interval '2 days'),
    CONSTRAINT trading_sessions_day_check CHECK (
        trading_day BETWEEN (opens_at AT TIME ZONE 'UTC')::date - 7 AND (opens_at AT TIME ZONE 'UTC')::date + 7)
);

COMMENT ON TABLE ingest.trading_sessions IS 'The exchange''s trading sessions. A part that is not covered is a gap.';
COMMENT ON COLUMN ingest.trading_sessions.calendar IS 'XNZE, or always.';
COMMENT ON COLUMN ingest.trading_sessions.trading_day IS 'The exchange''s day.';
COMMENT ON COLUMN ingest.trading_sessions.opens_at IS 'Opening.';
COMMENT ON COLUMN ingest.trading_sessions.closes_at IS 'Close.';

CREATE TABLE ingest.backfills (
    gap_from TIMESTAMP WITH TIME ZONE NOT NULL,
    gap_until TIMESTAMP WITH TIME ZONE NOT NULL,
    symbol TEXT NOT NULL,
    status TEXT NOT NULL,
    bars INTEGER DEFAULT 0 NOT NULL,
    attempts INTEGER DEFAULT 0 NOT NULL,
    error TEXT,
    started_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT backfills_pkey PRIMARY KEY (gap_from, gap_until, symbol),
    CONSTRAINT backfills_order_check CHECK (gap_from < gap_until)
);

COMMENT ON TABLE ingest.backfills IS 'What was done to fill each gap, by symbol.';
COMMENT ON COLUMN ingest.backfills.gap_from IS 'Start of the gap.';
COMMENT ON COLUMN ingest.backfills.gap_until IS 'End of the gap.';
COMMENT ON COLUMN ingest.backfills.symbol IS 'The symbol that was asked for.';
COMMENT ON COLUMN ingest.backfills.status IS 'How it stands.';
COMMENT ON COLUMN ingest.backfills.bars IS 'Bars received.';
COMMENT ON COLUMN ingest.backfills.attempts IS 'How often it was tried.';
COMMENT ON COLUMN ingest.backfills.error IS 'What the last attempt failed with.';
COMMENT ON COLUMN ingest.backfills.started_at IS 'First attempt.';
COMMENT ON COLUMN ingest.backfills.finished_at IS 'When it was settled.';

CREATE TABLE ingest.settings (
    singleton BOOLEAN DEFAULT true NOT NULL,
    calendar TEXT NOT NULL,
    exchange_timezone TEXT NOT NULL,
    coverage_lead INTERVAL NOT NULL,
    coverage_tail INTERVAL NOT NULL,
    coverage_margin INTERVAL NOT NULL,
    stall_timeout INTERVAL NOT NULL,
    coverage_since TIMESTAMP WITH TIME ZONE,
    minimum_version TEXT,
    CONSTRAINT settings_pkey PRIMARY KEY (singleton),
    CONSTRAINT settings_singleton_check CHECK (singleton),
    CONSTRAINT settings_coverage_check CHECK (
        coverage_lead BETWEEN '0' AND '1 day' AND coverage_tail BETWEEN '0' AND '1 day'
        AND coverage_margin BETWEEN '0' AND '1 day' AND stall_timeout BETWEEN '0' AND '1 day'
        AND isfinite(coverage_since))
);

COMMENT ON TABLE ingest.settings IS 'The settings that SQL needs. The first migration writes them; later changes are deliberate.';
COMMENT ON COLUMN ingest.settings.singleton IS 'There is one row.';
COMMENT ON COLUMN ingest.settings.calendar IS 'The trading calendar in force.';
COMMENT ON COLUMN ingest.settings.exchange_timezone IS 'The exchange''s time zone.';
COMMENT ON COLUMN ingest.settings.coverage_lead IS 'Time before the opening that counts as trading time.';
COMMENT ON COLUMN ingest.settings.coverage_tail IS 'Time after the close that counts as trading time.';
COMMENT ON COLUMN ingest.settings.coverage_margin IS 'Doubt between the exchange''s clock and ours.';
COMMENT ON COLUMN ingest.settings.stall_timeout IS 'Silence in trading hours after which a stream counts as dead.';
COMMENT ON COLUMN ingest.settings.coverage_since IS 'Start of coverage; null: the first session.';
COMMENT ON COLUMN ingest.settings.minimum_version IS 'Oldest ingestor that may write here; null: any.';
