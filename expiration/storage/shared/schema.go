package shared

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// schemaVersion is the version of the tables. A release that changes a table must raise it, and migrate tables of earlier versions. No release
// has had version 1 or 2.
const schemaVersion = 3

// allTables is the number of tables, with that of the version.
const allTables = 8

// The version is stored in a table of its own, which has one row.
const (
	createVersionSQL = "CREATE TABLE IF NOT EXISTS expiration_schema (version INTEGER NOT NULL)"
	selectVersionSQL = "SELECT version FROM expiration_schema"
	insertVersionSQL = "INSERT INTO expiration_schema (version) VALUES ($1)"
)

// errUnreleased is the error for tables without a version. Only servers from before the first release made such tables.
var errUnreleased = errors.New("its tables were made by a version from before the first release, which this version cannot read:" +
	" go on with that version, or give up its timers and drop all tables whose names begin with expiration_ (SQLite: delete the file)")

// SchemaSQL makes the missing tables, with the types of SQLite.
const SchemaSQL = `
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
	service BOOLEAN NOT NULL DEFAULT FALSE
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
	error TEXT,
	-- the room had the event already
	existed BOOLEAN NOT NULL
);
CREATE INDEX IF NOT EXISTS expiration_finalised_sender ON expiration_finalised (sender, finalised_nid);
CREATE INDEX IF NOT EXISTS expiration_finalised_request ON expiration_finalised (request_hash) WHERE request_hash IS NOT NULL;
CREATE INDEX IF NOT EXISTS expiration_finalised_event ON expiration_finalised (event_id) WHERE event_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS expiration_finalised_time ON expiration_finalised (finalised_ms);

CREATE TABLE IF NOT EXISTS expiration_delegations (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	-- that of the timer, because after a restart numbers of deleted timers are used again
	token_hash BLOB NOT NULL,
	-- NULL if the timer alone identifies the delegation
	member_key BLOB UNIQUE,
	-- the participant at the SFU
	sfu_room TEXT NOT NULL,
	identity TEXT NOT NULL,
	taken_ms INTEGER NOT NULL,
	-- 0 if the participant was never seen
	seen_ms INTEGER NOT NULL,
	room_sid TEXT NOT NULL,
	phase TEXT NOT NULL
);

CREATE TABLE IF NOT EXISTS expiration_participants (
	sfu_room TEXT NOT NULL,
	identity TEXT NOT NULL,
	room_id TEXT NOT NULL,
	user_id TEXT NOT NULL,
	made_ms INTEGER NOT NULL,
	-- the user has left the room, and the SFU has not been told yet
	leaving BOOLEAN NOT NULL DEFAULT FALSE,
	PRIMARY KEY (sfu_room, identity)
);
CREATE INDEX IF NOT EXISTS expiration_participants_member ON expiration_participants (room_id, user_id);
CREATE INDEX IF NOT EXISTS expiration_participants_leaving ON expiration_participants (leaving) WHERE leaving`

// CreateSchema makes the tables in one transaction, if they are missing. It refuses tables of another version and leaves them unchanged. tablesSQL
// counts the existing tables whose names begin with expiration_, and schemaSQL makes the tables.
func CreateSchema(ctx context.Context, db *sql.DB, tablesSQL, schemaSQL string) error {
	txn, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	return Commit(txn, func(txn *sql.Tx) error {
		var tables, version int
		if err := txn.QueryRowContext(ctx, tablesSQL).Scan(&tables); err != nil {
			return err
		}
		if _, err := txn.ExecContext(ctx, createVersionSQL); err != nil {
			return err
		}
		err := txn.QueryRowContext(ctx, selectVersionSQL).Scan(&version)
		switch {
		case errors.Is(err, sql.ErrNoRows) && tables > 0, err == nil && version < schemaVersion:
			return errUnreleased
		case err == nil && version != schemaVersion:
			return fmt.Errorf("its tables have version %d, and this server needs version %d: start the server that made them",
				version, schemaVersion)
		case errors.Is(err, sql.ErrNoRows):
			_, err = txn.ExecContext(ctx, insertVersionSQL, schemaVersion)
		case tables == allTables: // to make them again would lock them, which a server that writes them can run into
			return err
		}
		if err == nil {
			_, err = txn.ExecContext(ctx, schemaSQL)
		}
		return err
	})
}
