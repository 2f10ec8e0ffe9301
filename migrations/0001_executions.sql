-- Names are unqualified: each connection's search_path is the sidecar's own schema.

CREATE TABLE executions (
    id                 uuid        PRIMARY KEY,
    project_id         text        NOT NULL,
    -- The sidecar instance (its state directory) that runs it.
    owner              uuid        NOT NULL,
    task_id            uuid        NOT NULL,
    session_id         uuid        NOT NULL,
    status             text        NOT NULL CHECK (status IN
        ('pending', 'running', 'waiting_input', 'paused', 'completed', 'failed', 'cancelled')),
    reason             text,
    progress           smallint    CHECK (progress BETWEEN 0 AND 100),
    last_seq           bigint      NOT NULL CHECK (last_seq >= 0),
    -- `json`, not `jsonb`: jsonb refuses an escaped NUL, and json gives back the very text.
    task               json        NOT NULL,
    protections        text[]      NOT NULL,
    final_message      text,
    files_modified     text[]      NOT NULL,
    usage              json        NOT NULL,
    created_at         timestamptz NOT NULL,
    started_at         timestamptz,
    completed_at       timestamptz,
    paused_ms          bigint      NOT NULL CHECK (paused_ms >= 0),
    idempotency_key    text,
    idempotency_caller text,
    fingerprint        bytea,
    CONSTRAINT reason_with_final_status CHECK ((reason IS NOT NULL) = (status IN ('completed', 'failed', 'cancelled'))),
    CONSTRAINT end_with_final_status CHECK ((completed_at IS NOT NULL) = (status IN ('completed', 'failed', 'cancelled'))),
    UNIQUE (project_id, idempotency_caller, idempotency_key)
) WITH (fillfactor = 80); -- last_seq moves with every batch: leave room for updates within the page

CREATE INDEX executions_history ON executions (project_id, created_at DESC, id DESC);
CREATE INDEX executions_by_task ON executions (task_id, created_at DESC, id DESC);
CREATE INDEX executions_by_session ON executions (session_id, created_at DESC, id DESC);
CREATE INDEX executions_unfinished ON executions (owner) WHERE completed_at IS NULL;

CREATE TABLE execution_events (
    execution_id uuid        NOT NULL REFERENCES executions ON DELETE CASCADE,
    seq          bigint      NOT NULL CHECK (seq > 0),
    type         text        NOT NULL,
    severity     text        NOT NULL,
    ts           timestamptz NOT NULL,
    -- The envelope as every reader gets it, byte for byte.
    envelope     json        NOT NULL,
    PRIMARY KEY (execution_id, seq)
);
