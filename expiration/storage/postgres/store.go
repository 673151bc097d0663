// Package postgres keeps timers in a PostgreSQL database.
package postgres

import (
	"context"
	"database/sql"

	"github.com/lib/pq"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
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
	return &shared.Store{DB: db, Writer: writer{db}}, nil
}

// A refresh changes no indexed column, so that it need not touch an index.
const refreshTimersSQL = "UPDATE expiration_timers AS t SET duration_ms = r.duration_ms, deadline_ms = r.deadline_ms" +
	" FROM unnest($1::TEXT[], $2::BIGINT[], $3::BIGINT[]) AS r (event_id, duration_ms, deadline_ms)" +
	" WHERE t.event_id = r.event_id AND t.outcome IS NULL RETURNING t.event_id"

type writer struct{ db *sql.DB }

func (w writer) Exec(ctx context.Context, query string, args ...any) (sql.Result, error) {
	return w.db.ExecContext(ctx, query, args...)
}

func (w writer) Refresh(ctx context.Context, refreshes []expiration.Refresh, found func(eventID string)) error {
	ids := make([]string, len(refreshes))
	durations, deadlines := make([]int64, len(refreshes)), make([]int64, len(refreshes))
	for i, r := range refreshes {
		ids[i], durations[i], deadlines[i] = r.EventID, r.Duration.Milliseconds(), r.Deadline.UnixMilli()
	}
	rows, err := w.db.QueryContext(ctx, refreshTimersSQL, pq.Array(ids), pq.Array(durations), pq.Array(deadlines))
	if err != nil {
		return err
	}
	return shared.ScanEventIDs(ctx, rows, found)
}
