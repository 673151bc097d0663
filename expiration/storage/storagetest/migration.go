package storagetest

import (
	"database/sql"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
)

// Migration fills a database with what the first version had, given all migrations.
func Migration(t *testing.T, db *sql.DB, migrations []shared.Migration) {
	require.NoError(t, shared.Migrate(t.Context(), db, migrations[0]))
	for n := range 2 {
		e := newTimer(n)
		_, err := db.ExecContext(t.Context(), "INSERT INTO expiration_timers (event_id, room_id, event_type, state_key, sender,"+
			" token_hash, duration_ms, received_ms, deadline_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
			e.Event.ID, e.Event.RoomID, e.Event.Type, e.Event.StateKey, e.Event.Sender, e.TokenHash[:],
			e.Duration.Milliseconds(), e.Received.UnixMilli(), e.Deadline.UnixMilli())
		require.NoError(t, err)
	}
}

// Migrated requires that the store has it all, and goes on working.
func Migrated(t *testing.T, store expiration.Store) {
	found := map[string]expiration.Timer{}
	nids := map[int64]bool{}
	require.NoError(t, store.Timers(t.Context(), func(got expiration.Timer) error {
		require.Positive(t, got.NID)
		nids[got.NID] = true
		found[got.Event.ID] = got
		return nil
	}))
	require.Len(t, nids, 2)
	for n := range 2 {
		want := newTimer(n)
		want.Event.Request = nil
		want.NID = found[want.Event.ID].NID
		require.Equal(t, want, found[want.Event.ID])
	}
	another := newTimer(7)
	require.NoError(t, store.Insert(t.Context(), another))
	got, err := store.Timer(t.Context(), another.NID)
	require.NoError(t, err)
	require.Equal(t, another, got)
}
