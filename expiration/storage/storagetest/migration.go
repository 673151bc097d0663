package storagetest

import (
	"database/sql"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
)

// beforeDelayed is how many migrations there were before there were delayed events.
const beforeDelayed = 3

// claimedBefore is the number of the timer that was claimed before there were delayed events.
const claimedBefore = 2

// Migration fills a database with what earlier versions had, given all migrations: running timers of the first, and a claimed
// one of the last that knew expiring events alone.
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
	require.NoError(t, shared.Migrate(t.Context(), db, migrations[:beforeDelayed]...))
	e, claim := newTimer(claimedBefore), newClaim(claimedBefore)
	_, err := db.ExecContext(t.Context(), "INSERT INTO expiration_timers (timer_nid, event_id, room_id, event_type, state_key,"+
		" sender, token_hash, duration_ms, received_ms, deadline_ms, request_hash, room_version, pdu, outcome, closing_event_id,"+
		" closing_room_version, closing_pdu) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
		e.NID, e.Event.ID, e.Event.RoomID, e.Event.Type, e.Event.StateKey, e.Event.Sender, e.TokenHash[:],
		e.Duration.Milliseconds(), e.Received.UnixMilli(), e.Deadline.UnixMilli(),
		e.Event.Request.Hash[:], e.Event.Request.Signed.RoomVersion, e.Event.Request.Signed.PDU,
		string(claim.Outcome), claim.Event.EventID, claim.Event.RoomVersion, claim.Event.PDU)
	require.NoError(t, err)
}

// Migrated requires that the store has it all, and goes on working.
func Migrated(t *testing.T, store expiration.Store) {
	found := map[string]expiration.Timer{}
	nids := map[int64]bool{}
	for _, row := range index(t, store) {
		require.Positive(t, row.NID)
		require.Zero(t, row.Digest)
		nids[row.NID] = true
		got, err := read(t.Context(), store, row.NID)
		require.NoError(t, err)
		found[got.Event.ID] = got
	}
	require.Len(t, nids, 3)
	for n := range 2 {
		want := newTimer(n)
		want.Event.Request = nil
		want.NID = found[want.Event.ID].NID
		require.Equal(t, want, found[want.Event.ID])
	}
	claimed, claim := newTimer(claimedBefore), newClaim(claimedBefore)
	claimed.Claim = &claim
	got, err := read(t.Context(), store, claimed.NID)
	require.NoError(t, err)
	require.Equal(t, claimed, got)

	for _, another := range []expiration.Timer{newTimer(7), newDelayed(8)} {
		require.NoError(t, tryInsert(t.Context(), store, another))
		got, err := read(t.Context(), store, another.NID)
		require.NoError(t, err)
		require.Equal(t, another, got)
	}
	finalise(t, store, 8, newFinal(8), true, true)
	wantFinalised(t, store, 8, newFinal(8))
}
