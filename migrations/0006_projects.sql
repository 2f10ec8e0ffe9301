-- To each project its own rows, where several share a schema: a role that is bound to a project (`bind_role`) reads and
-- writes that project's rows and no others, whatever SQL it sends. The role that owns the tables is not held to it; it could
-- take it away. Whoever adds a table with rows of projects gives it row security and a policy; a test looks at every table.
--
-- `current_user`, not `session_user`: rights go by it too, and a function of one role that another calls must not read with
-- the caller's eyes.

-- Written by the owner alone; a role sees its own line.
CREATE TABLE project_roles (
    role       name PRIMARY KEY,
    project_id text NOT NULL CHECK (project_id <> '')
);
ALTER TABLE project_roles ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_line ON project_roles FOR SELECT USING (role = current_user);

-- What is to be removed stays its project's; before this it was nobody's, under the empty name, and out of sight.
DELETE FROM executions WHERE project_id = '';
ALTER TABLE executions ADD COLUMN forgotten boolean NOT NULL DEFAULT false;
ALTER TABLE executions ADD CONSTRAINT somebodys CHECK (project_id <> '');
CREATE INDEX executions_forgotten ON executions (project_id) WHERE forgotten;

-- `(SELECT …)` is asked once in a statement, not for each row; and where the statement names the project too, which all of
-- ours do, the planner compares the two once and goes by its indexes as before.
ALTER TABLE executions ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_project ON executions USING
    (project_id = (SELECT r.project_id FROM project_roles r WHERE r.role = current_user));
ALTER TABLE sessions ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_project ON sessions USING
    (project_id = (SELECT r.project_id FROM project_roles r WHERE r.role = current_user));
ALTER TABLE callbacks ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_project ON callbacks USING
    (project_id = (SELECT r.project_id FROM project_roles r WHERE r.role = current_user));
ALTER TABLE owners ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_project ON owners USING
    (project_id = (SELECT r.project_id FROM project_roles r WHERE r.role = current_user));

-- Events are those of executions that the role sees. Not EXISTS or IN, of which the planner may make a list of all
-- executions for each statement.
ALTER TABLE execution_events ENABLE ROW LEVEL SECURITY;
CREATE POLICY read_own ON execution_events FOR SELECT USING ((SELECT true FROM executions x WHERE x.id = execution_id));
CREATE POLICY remove_own ON execution_events FOR DELETE USING ((SELECT true FROM executions x WHERE x.id = execution_id));
-- New ones are checked by the statement (below): row by row it would make a third of their cost. None is ever changed.
CREATE POLICY add ON execution_events FOR INSERT WITH CHECK (true);

-- pg_temp is looked at first unless it is named: with this in force, nobody's temporary table is taken for one of ours in
-- the functions that follow.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE FUNCTION refuse_events_of_others() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    -- As whoever writes them: row security holds for this too.
    IF EXISTS (SELECT FROM (SELECT DISTINCT execution_id FROM added) a
               WHERE NOT EXISTS (SELECT FROM executions x WHERE x.id = a.execution_id)) THEN
        RAISE insufficient_privilege USING MESSAGE = 'events of an execution that this role does not see';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER of_own_executions AFTER INSERT ON execution_events REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_events_of_others();

-- Why row security does not hold a role: it, or one that it may become, stands above it or can get round it. Null where
-- it holds.
CREATE FUNCTION sees_every_project(asked name) RETURNS text
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
    SELECT CASE WHEN r.rolname = asked THEN 'it ' ELSE 'it may act as ' || r.rolname || ', which ' END ||
           CASE WHEN r.rolsuper THEN 'is a superuser'
                WHEN r.oid = t.relowner THEN 'owns the tables'
                WHEN r.rolbypassrls THEN 'has BYPASSRLS'
                WHEN r.rolcreaterole THEN 'has CREATEROLE'
                WHEN r.rolreplication THEN 'has REPLICATION'
                ELSE 'reaches the files of the server' END
    FROM pg_roles r, pg_class t
    WHERE t.oid = 'project_roles'::regclass AND pg_has_role(asked, r.oid, 'MEMBER')
      AND (r.oid = t.relowner OR r.rolsuper OR r.rolbypassrls OR r.rolcreaterole OR r.rolreplication
           OR r.rolname IN ('pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program'))
    ORDER BY r.rolname <> asked, r.rolname LIMIT 1
$$;

-- The rights of a bound role, on the tables that have row security and on no other. Also after a migration that adds one.
CREATE FUNCTION grant_rights(pod name) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    own name;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), pod);
    EXECUTE format('GRANT SELECT ON project_roles, _sqlx_migrations TO %I', pod);
    FOR own IN SELECT tablename FROM pg_tables
               WHERE schemaname = current_schema() AND rowsecurity AND tablename <> 'project_roles'
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, DELETE ON %I TO %I', own, pod);
        IF own <> 'execution_events' THEN
            EXECUTE format('GRANT UPDATE ON %I TO %I', own, pod);
        END IF;
    END LOOP;
END
$$;

-- Binds a role to a project, and gives it the rights that a sidecar needs. A project may have several roles.
CREATE FUNCTION bind_role(pod name, project text) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    why text;
    other record;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = pod) THEN
        RAISE EXCEPTION 'there is no role %', pod;
    END IF;
    why := sees_every_project(pod);
    IF why IS NOT NULL THEN
        RAISE EXCEPTION 'role % would see every project: %', pod, why;
    END IF;
    SELECT r.role, r.project_id INTO other FROM project_roles r JOIN pg_roles a ON a.rolname = r.role
    WHERE r.project_id <> project
      AND (pg_has_role(pod, r.role, 'MEMBER') OR pg_has_role(r.role, pod, 'MEMBER')) LIMIT 1;
    IF other.role = pod THEN
        RAISE EXCEPTION 'role % is bound to project %: unbind_role first', pod, other.project_id;
    ELSIF other.role IS NOT NULL THEN
        RAISE EXCEPTION 'one of the roles % and % may act as the other, which is bound to project %',
            pod, other.role, other.project_id;
    END IF;
    INSERT INTO project_roles (role, project_id) VALUES (pod, project) ON CONFLICT DO NOTHING;
    PERFORM grant_rights(pod);
END
$$;

-- Takes its project and its rights from a role. It can be dropped then, and may have been.
CREATE FUNCTION unbind_role(pod name) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    DELETE FROM project_roles WHERE role = pod;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = pod) THEN
        EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA %I FROM %I', current_schema(), pod);
        EXECUTE format('REVOKE ALL ON SCHEMA %I FROM %I', current_schema(), pod);
    END IF;
END
$$;

REVOKE ALL ON FUNCTION refuse_events_of_others(), grant_rights(name), bind_role(name, text), unbind_role(name) FROM PUBLIC;
