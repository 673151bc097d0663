package postgres

import (
	"context"
	"database/sql"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

func TestMain(m *testing.M) { postgres.Main(m) }

// newDatabase returns an empty database.
func newDatabase(t *testing.T) *sql.DB {
	t.Helper()
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(postgres.NewDatabase(t))}
	options.Defaults(10)
	db, err := sqlutil.Open(options, sqlutil.NewDummyWriter())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

// Opening a database whose tables are being written, by whoever reads them beside a server, does not wait for the writer.
func TestOpenLocksNothing(t *testing.T) {
	db := newDatabase(t)
	_, err := Open(t.Context(), db)
	require.NoError(t, err)
	txn, err := db.BeginTx(t.Context(), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, txn.Rollback()) }()
	for _, table := range []string{"timers", "deadlines", "digests", "claims", "finalised", "delegations", "participants"} {
		_, err = txn.ExecContext(t.Context(), "LOCK TABLE expiration_"+table+" IN ROW EXCLUSIVE MODE")
		require.NoError(t, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err = Open(ctx, db)
	require.NoError(t, err)
}

// A page that was filled with timers has room for many new versions after the timers were refreshed, see slackSQL.
func TestRefreshedRowsLeaveRoom(t *testing.T) {
	db := newDatabase(t)
	store, err := Open(t.Context(), db)
	require.NoError(t, err)
	_, err = db.ExecContext(t.Context(), "INSERT INTO expiration_deadlines (timer_nid, duration_ms, deadline_ms)"+
		" SELECT n, 1000, 1000 FROM generate_series(1, 1000) AS n")
	require.NoError(t, err)
	// taken returns the share of the first page that the rows in it take, without their old versions.
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
	for i := range refreshes { // one by one, so that each new version can use the space of an old one
		found, err := store.Refresh(t.Context(), refreshes[i:i+1])
		require.NoError(t, err)
		require.Equal(t, []bool{true}, found)
	}
	require.Less(t, taken(), 0.7)
	require.Greater(t, taken(), 0.6, "the rows have moved to other pages")
}

// Ping fails if the database can only be read, as on a standby server or with default_transaction_read_only.
func TestPingNoticesThatNothingCanBeWritten(t *testing.T) {
	db := newDatabase(t)
	store, err := Open(t.Context(), db)
	require.NoError(t, err)
	require.NoError(t, store.Ping(t.Context()))
	db.SetMaxOpenConns(1) // because SET changes only one connection
	_, err = db.ExecContext(t.Context(), "SET default_transaction_read_only = on")
	require.NoError(t, err)
	require.ErrorIs(t, store.Ping(t.Context()), errReadOnly)
}
