-- Each sidecar counts up while it lives and can write here. Whoever has seen a count stand still for a whole term, while it
-- could write itself, takes over what its owner has left.
CREATE TABLE owners (
    owner      uuid        PRIMARY KEY,
    project_id text        NOT NULL,
    beats      bigint      NOT NULL,
    beat_at    timestamptz NOT NULL
);

-- Counts up with each sidecar, and each life of one, that has to do with the execution; a status comes from the latest alone.
ALTER TABLE executions ADD COLUMN generation integer NOT NULL DEFAULT 1 CHECK (generation > 0);
-- The last event of the owner from which it was taken over: what the new one wrote stands after it. Null where it never was.
ALTER TABLE executions ADD COLUMN taken_over_after bigint CHECK (taken_over_after >= 0);

CREATE INDEX executions_by_key ON executions (project_id, idempotency_caller, idempotency_key, created_at DESC)
    WHERE idempotency_key IS NOT NULL;
