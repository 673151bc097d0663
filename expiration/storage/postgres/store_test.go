package postgres

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// A page that was filled with timers has room for many new versions once they were refreshed, see addSlackSQL.
func TestRefreshedRowsLeaveRoom(t *testing.T) {
	db := newDatabase(t)
	store, err := Open(t.Context(), db)
	require.NoError(t, err)
	_, err = db.ExecContext(t.Context(), "INSERT INTO expiration_deadlines (timer_nid, duration_ms, deadline_ms)"+
		" SELECT n, 1000, 1000 FROM generate_series(1, 1000) AS n")
	require.NoError(t, err)
	// taken returns how much of the first page its rows take, old versions not counted.
	taken := func() (share float64) {
		t.Helper()
		const itemPointer = 4
		require.NoError(t, db.QueryRowContext(t.Context(),
			"SELECT sum(pg_column_size(d.*) + $1)::FLOAT / current_setting('block_size')::FLOAT"+
				" FROM expiration_deadlines AS d WHERE ctid < '(1,0)'", itemPointer).Scan(&share))
		return share
	}
	require.InDelta(t, 0.9, taken(), 0.02)

	refreshes := make([]expiration.Refresh, 1000)
	for i := range refreshes {
		refreshes[i] = expiration.Refresh{NID: int64(i) + 1, Duration: time.Second, Deadline: time.UnixMilli(2000)}
	}
	for i := range refreshes { // one by one: each in the place of what was there before
		found, err := store.Refresh(t.Context(), refreshes[i:i+1])
		require.NoError(t, err)
		require.Equal(t, []bool{true}, found)
	}
	require.Less(t, taken(), 0.7)
	require.Greater(t, taken(), 0.6, "the rows have moved to other pages")
}

// A server that has become a standby, or was told to write nothing, can still be read.
func TestPingNoticesThatNothingCanBeWritten(t *testing.T) {
	db := newDatabase(t)
	store, err := Open(t.Context(), db)
	require.NoError(t, err)
	require.NoError(t, store.Ping(t.Context()))
	db.SetMaxOpenConns(1) // what one connection was told, no other knows
	_, err = db.ExecContext(t.Context(), "SET default_transaction_read_only = on")
	require.NoError(t, err)
	require.ErrorIs(t, store.Ping(t.Context()), errReadOnly)
}
