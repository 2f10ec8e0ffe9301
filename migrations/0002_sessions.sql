-- Sessions that outlive their executions, and what the backend still has to be told of them.

CREATE TABLE sessions (
    project_id    text        NOT NULL,
    -- The caller's own id.
    id            uuid        NOT NULL,
    -- The sidecar instance that runs it.
    owner         uuid        NOT NULL,
    -- OpenCode's id of the conversation.
    remote_id     text        NOT NULL,
    -- The model without its key.
    model         json        NOT NULL,
    system_prompt text,
    created_at    timestamptz NOT NULL,
    -- It takes no more prompts since then.
    ended_at      timestamptz,
    PRIMARY KEY (project_id, id)
);

CREATE INDEX sessions_newest ON sessions (project_id, created_at DESC, id DESC);
CREATE INDEX sessions_open ON sessions (owner) WHERE ended_at IS NULL;

-- Place among the executions of a session that outlives them, from 1; null where the session is the execution's own.
ALTER TABLE executions ADD COLUMN ordinal integer CHECK (ordinal > 0);
-- What went wrong, for people, where it failed.
ALTER TABLE executions ADD COLUMN error text;
CREATE UNIQUE INDEX executions_in_session ON executions (project_id, session_id, ordinal) WHERE ordinal IS NOT NULL;

-- Changes of status that the backend has not taken yet, in the order of their ids. Written in the transaction of the
-- change itself.
CREATE TABLE callbacks (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id text        NOT NULL,
    session_id uuid        NOT NULL,
    status     text        NOT NULL,
    error      text,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX callbacks_by_session ON callbacks (project_id, session_id, id);
