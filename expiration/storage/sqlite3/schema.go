package sqlite3

// tablesSQL counts the existing tables whose names begin with expiration_.
const tablesSQL = `SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name LIKE 'expiration\_%' ESCAPE '\'`

// schemaSQL makes the missing tables. Package shared describes what they contain.
const schemaSQL = `
CREATE TABLE IF NOT EXISTS expiration_timers (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	-- for a delayed event, the row's own ID
	event_id TEXT NOT NULL UNIQUE,
	room_id TEXT NOT NULL,
	event_type TEXT NOT NULL,
	-- NULL for events that are not state
	state_key TEXT,
	-- the full user ID
	sender TEXT NOT NULL,
	-- SHA-256 of the refresh token, or of the delay ID
	token_hash BLOB NOT NULL,
	received_ms INTEGER NOT NULL,
	-- NULL for events that are sent without a transaction ID
	request_hash BLOB,
	room_version TEXT,
	pdu BLOB,
	-- NULL for expiring events; the rest is used for delayed events only
	content BLOB,
	expires_ms INTEGER NOT NULL DEFAULT 0,
	origin_server_ts INTEGER NOT NULL DEFAULT 0,
	over_event_id TEXT NOT NULL DEFAULT '',
	exempt BOOLEAN NOT NULL DEFAULT FALSE
);
CREATE UNIQUE INDEX IF NOT EXISTS expiration_timers_request ON expiration_timers (request_hash) WHERE content IS NOT NULL;

CREATE TABLE IF NOT EXISTS expiration_deadlines (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	duration_ms INTEGER NOT NULL,
	deadline_ms INTEGER NOT NULL,
	-- NULL while the timer runs
	outcome TEXT
);

CREATE TABLE IF NOT EXISTS expiration_digests (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	digest BLOB NOT NULL
);

CREATE TABLE IF NOT EXISTS expiration_claims (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	event_id TEXT NOT NULL,
	room_version TEXT NOT NULL,
	pdu BLOB NOT NULL
);

CREATE TABLE IF NOT EXISTS expiration_finalised (
	-- the order in which events were finalised
	finalised_nid INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	row_id TEXT NOT NULL,
	room_id TEXT NOT NULL,
	event_type TEXT NOT NULL,
	state_key TEXT,
	sender TEXT NOT NULL,
	token_hash BLOB NOT NULL UNIQUE,
	duration_ms INTEGER NOT NULL,
	received_ms INTEGER NOT NULL,
	deadline_ms INTEGER NOT NULL,
	request_hash BLOB,
	content BLOB NOT NULL,
	finalised_ms INTEGER NOT NULL,
	-- NULL unless the event was sent
	event_id TEXT,
	-- NULL unless the event was refused
	error TEXT
);
CREATE INDEX IF NOT EXISTS expiration_finalised_sender ON expiration_finalised (sender, finalised_nid);
CREATE INDEX IF NOT EXISTS expiration_finalised_request ON expiration_finalised (request_hash) WHERE request_hash IS NOT NULL;
CREATE INDEX IF NOT EXISTS expiration_finalised_event ON expiration_finalised (event_id) WHERE event_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS expiration_finalised_time ON expiration_finalised (finalised_ms)`
