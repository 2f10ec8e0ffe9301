-- Which execution a key belongs to is decided by the sidecar, which must know it without the database. Rows only keep it:
-- of several with one key, the newest has it. A key is free again after 24 h, so several may have it.
ALTER TABLE executions DROP CONSTRAINT executions_project_id_idempotency_caller_idempotency_key_key;
CREATE INDEX executions_with_key ON executions (project_id, created_at DESC) WHERE idempotency_key IS NOT NULL;
