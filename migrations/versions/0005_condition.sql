-- The table of revision 0005, the same in every edition. Frozen, as those before it.

CREATE TABLE ingest.day_changes (
    trading_day DATE NOT NULL,
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    changed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT day_changes_pkey PRIMARY KEY (trading_day, id)
);

COMMENT ON TABLE ingest.day_changes IS 'When a day''s data changed otherwise than by ticks that were stored as they arrived. The newest row of a day counts.';
COMMENT ON COLUMN ingest.day_changes.trading_day IS 'The exchange''s day.';
COMMENT ON COLUMN ingest.day_changes.id IS 'The database''s number of the note.';
COMMENT ON COLUMN ingest.day_changes.changed_at IS 'When they changed: by late ticks, a delayed commit, a backfill or an exclusion.';
