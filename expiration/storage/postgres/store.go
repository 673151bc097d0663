// Package postgres keeps timers in a PostgreSQL database.
package postgres

import (
	"context"
	"database/sql"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
)

// The fill factor leaves room in each page for the new version of a refreshed row.
const createTimersSQL = `
CREATE TABLE expiration_timers (
	event_id TEXT NOT NULL PRIMARY KEY,
	room_id TEXT NOT NULL,
	event_type TEXT NOT NULL,
	-- NULL for events that are not state
	state_key TEXT,
	-- the full user ID
	sender TEXT NOT NULL,
	-- SHA-256 of the refresh token
	token_hash BYTEA NOT NULL,
	duration_ms BIGINT NOT NULL,
	received_ms BIGINT NOT NULL,
	deadline_ms BIGINT NOT NULL,
	-- NULL while the timer runs; set together once it is claimed
	outcome TEXT,
	closing_event_id TEXT,
	closing_room_version TEXT,
	closing_pdu BYTEA
) WITH (fillfactor = 70)`

// NULL for events that are not sent with a transaction ID
const addRequestsSQL = `
ALTER TABLE expiration_timers ADD COLUMN request_hash BYTEA;
ALTER TABLE expiration_timers ADD COLUMN room_version TEXT;
ALTER TABLE expiration_timers ADD COLUMN pdu BYTEA`

// Open prepares the database and returns the store.
func Open(ctx context.Context, db *sql.DB) (*shared.Store, error) {
	if err := shared.Migrate(ctx, db, shared.Migration{Name: "create timers", SQL: createTimersSQL},
		shared.Migration{Name: "add requests", SQL: addRequestsSQL}); err != nil {
		return nil, err
	}
	return &shared.Store{DB: db, Exec: db.ExecContext}, nil
}
