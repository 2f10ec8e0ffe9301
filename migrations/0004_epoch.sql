-- Which life of its log an execution is in: counts up where a loss of power may have taken events that a reader saw.
ALTER TABLE executions ADD COLUMN epoch integer NOT NULL DEFAULT 1 CHECK (epoch > 0);
