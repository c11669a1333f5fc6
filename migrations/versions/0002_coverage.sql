-- The tables of revision 0002, frozen here: later revisions change them, this file never.

CREATE TABLE ingest.exclusions (
    excluded_from TIMESTAMP WITH TIME ZONE NOT NULL,
    excluded_until TIMESTAMP WITH TIME ZONE NOT NULL,
    reason TEXT NOT NULL,
    noted_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT exclusions_pkey PRIMARY KEY (excluded_from, excluded_until),
    CONSTRAINT exclusions_order_check CHECK (excluded_from < excluded_until)
);

COMMENT ON TABLE ingest.exclusions IS 'Times in which the exchange itself did not trade or publish: a gap in them is excluded.';
COMMENT ON COLUMN ingest.exclusions.excluded_from IS 'From when on.';
COMMENT ON COLUMN ingest.exclusions.excluded_until IS 'Until when.';
COMMENT ON COLUMN ingest.exclusions.reason IS 'The reason, in the words of the person who recorded it.';
COMMENT ON COLUMN ingest.exclusions.noted_at IS 'When it was put on record.';

CREATE TABLE ingest.reconciliations (
    symbol TEXT NOT NULL,
    time TIMESTAMP WITH TIME ZONE NOT NULL,
    trading_day DATE NOT NULL,
    difference TEXT NOT NULL,
    our_open DOUBLE PRECISION,
    our_high DOUBLE PRECISION,
    our_low DOUBLE PRECISION,
    our_close DOUBLE PRECISION,
    our_volume BIGINT,
    their_open DOUBLE PRECISION,
    their_high DOUBLE PRECISION,
    their_low DOUBLE PRECISION,
    their_close DOUBLE PRECISION,
    their_volume BIGINT,
    compared_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT reconciliations_pkey PRIMARY KEY (symbol, time),
    CONSTRAINT reconciliations_difference_check CHECK (difference IN ('missing here', 'missing there', 'differs'))
);

CREATE INDEX reconciliations_trading_day_idx ON ingest.reconciliations (trading_day);

COMMENT ON TABLE ingest.reconciliations IS 'Minutes that were wholly covered, in which our bar and the provider''s are not the same.';
COMMENT ON COLUMN ingest.reconciliations.symbol IS 'The exchange''s symbol with its suffix.';
COMMENT ON COLUMN ingest.reconciliations.time IS 'Start of the minute.';
COMMENT ON COLUMN ingest.reconciliations.trading_day IS 'The exchange''s day.';
COMMENT ON COLUMN ingest.reconciliations.difference IS 'missing here, missing there, or differs.';
COMMENT ON COLUMN ingest.reconciliations.our_open IS 'First price by our ticks.';
COMMENT ON COLUMN ingest.reconciliations.our_high IS 'Highest price by our ticks.';
COMMENT ON COLUMN ingest.reconciliations.our_low IS 'Lowest price by our ticks.';
COMMENT ON COLUMN ingest.reconciliations.our_close IS 'Last price by our ticks.';
COMMENT ON COLUMN ingest.reconciliations.our_volume IS 'Units traded by our ticks.';
COMMENT ON COLUMN ingest.reconciliations.their_open IS 'First price by the provider.';
COMMENT ON COLUMN ingest.reconciliations.their_high IS 'Highest price by the provider.';
COMMENT ON COLUMN ingest.reconciliations.their_low IS 'Lowest price by the provider.';
COMMENT ON COLUMN ingest.reconciliations.their_close IS 'Last price by the provider.';
COMMENT ON COLUMN ingest.reconciliations.their_volume IS 'Units traded by the provider.';
COMMENT ON COLUMN ingest.reconciliations.compared_at IS 'When they were compared.';

ALTER TABLE ingest.settings ADD COLUMN bar_label TEXT DEFAULT 'start' NOT NULL;
ALTER TABLE ingest.settings ADD CONSTRAINT settings_bar_label_check CHECK (bar_label IN ('start', 'end'));

COMMENT ON COLUMN ingest.settings.bar_label IS 'Whether the provider''s bars carry the time of their start or of their end; ingestor reconcile finds out.';

ALTER TABLE ingest.backfills ADD COLUMN next_attempt_at TIMESTAMP WITH TIME ZONE;

COMMENT ON COLUMN ingest.backfills.next_attempt_at IS 'Of what is pending: not before this does ingestor backfill --watch ask again.';

CREATE INDEX backfills_pending_idx ON ingest.backfills (gap_from) WHERE status = 'pending';
CREATE INDEX backfills_whole_idx ON ingest.backfills (gap_from) WHERE symbol = '*';
ALTER TABLE ingest.backfills ADD CONSTRAINT backfills_status_check CHECK (
    status IN ('pending', 'filled', 'no trades', 'unfillable', 'backfilled', 'partial'));

COMMENT ON TABLE ingest.backfills IS 'The backfill of each gap: a row for each symbol, and one named * for the complete gap.';
COMMENT ON COLUMN ingest.backfills.symbol IS 'The symbol that was asked for; * stands for all of them.';
COMMENT ON COLUMN ingest.backfills.status IS 'pending, filled, no trades, partial, unfillable; of the whole gap: pending, backfilled, partial, unfillable.';
COMMENT ON COLUMN ingest.backfills.error IS 'Why it is partial or unfillable, or what the last attempt failed with.'
