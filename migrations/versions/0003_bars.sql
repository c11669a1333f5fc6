-- The functions, tables and indexes of revision 0003, the same in every edition. Frozen, as those before it.

CREATE TYPE market.placed_price AS (
    price double precision,
    time timestamptz,
    received_at timestamptz,
    occurrence integer
);

COMMENT ON TYPE market.placed_price IS 'A price and its place in the order of trades: the state of open_price and close_price.';

-- In plpgsql, since a function in SQL can't be inlined here: measured at a third of the time of one, and at half of
-- array_agg(price ORDER BY time, received_at, occurrence). Most calls end with the first comparison.
CREATE FUNCTION market.earlier_price(
    state market.placed_price, price double precision, "time" timestamptz, received_at timestamptz, occurrence integer
) RETURNS market.placed_price LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF "time" > state.time THEN
        RETURN state;
    END IF;
    IF state IS NULL OR ("time", received_at, occurrence) < (state.time, state.received_at, state.occurrence) THEN
        RETURN ROW(price, "time", received_at, occurrence);
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION market.earlier_price IS 'The earlier of two prices. A step of open_price.';

CREATE FUNCTION market.later_price(
    state market.placed_price, price double precision, "time" timestamptz, received_at timestamptz, occurrence integer
) RETURNS market.placed_price LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF "time" < state.time THEN
        RETURN state;
    END IF;
    IF state IS NULL OR ("time", received_at, occurrence) > (state.time, state.received_at, state.occurrence) THEN
        RETURN ROW(price, "time", received_at, occurrence);
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION market.later_price IS 'The later of two prices. A step of close_price.';

CREATE FUNCTION market.earlier_of(one market.placed_price, other market.placed_price) RETURNS market.placed_price
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF other IS NULL THEN
        RETURN one;
    END IF;
    RETURN market.earlier_price(one, other.price, other.time, other.received_at, other.occurrence);
END
$$;

COMMENT ON FUNCTION market.earlier_of IS 'Joins two halves of an open_price.';

CREATE FUNCTION market.later_of(one market.placed_price, other market.placed_price) RETURNS market.placed_price
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF other IS NULL THEN
        RETURN one;
    END IF;
    RETURN market.later_price(one, other.price, other.time, other.received_at, other.occurrence);
END
$$;

COMMENT ON FUNCTION market.later_of IS 'Joins two halves of a close_price.';

CREATE FUNCTION market.price_of(state market.placed_price) RETURNS double precision
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN state.price;
END
$$;

COMMENT ON FUNCTION market.price_of IS 'The price without its place. The last step of open_price and close_price.';

CREATE AGGREGATE market.open_price(
    price double precision, "time" timestamptz, received_at timestamptz, occurrence integer
) (
    SFUNC = market.earlier_price, STYPE = market.placed_price, FINALFUNC = market.price_of,
    COMBINEFUNC = market.earlier_of, PARALLEL = SAFE
);

COMMENT ON AGGREGATE market.open_price(double precision, timestamptz, timestamptz, integer) IS 'The price that is first in the order (time, received_at, occurrence).';

CREATE AGGREGATE market.close_price(
    price double precision, "time" timestamptz, received_at timestamptz, occurrence integer
) (
    SFUNC = market.later_price, STYPE = market.placed_price, FINALFUNC = market.price_of,
    COMBINEFUNC = market.later_of, PARALLEL = SAFE
);

COMMENT ON AGGREGATE market.close_price(double precision, timestamptz, timestamptz, integer) IS 'The price that is last in the order (time, received_at, occurrence).';

CREATE TABLE ingest.stale_ranges (
    range_from TIMESTAMP WITH TIME ZONE NOT NULL,
    range_until TIMESTAMP WITH TIME ZONE NOT NULL,
    noted_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT stale_ranges_pkey PRIMARY KEY (range_from, range_until)
);

COMMENT ON TABLE ingest.stale_ranges IS 'Time spans that got late ticks. `ingestor maintain` recomputes their bars.';
COMMENT ON COLUMN ingest.stale_ranges.range_from IS 'Start of the hour of the oldest of them.';
COMMENT ON COLUMN ingest.stale_ranges.range_until IS 'End of the hour of the newest of them.';
COMMENT ON COLUMN ingest.stale_ranges.noted_at IS 'When the last of them came.';

ALTER TABLE ingest.settings ADD COLUMN ticks_since TIMESTAMP WITH TIME ZONE;

COMMENT ON COLUMN ingest.settings.ticks_since IS 'Ticks older than this were dropped, or may be, as INGESTOR_RETENTION said; null: none were.'
