package sqlite3

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
)

func openDatabase(t *testing.T) (*sql.DB, sqlutil.Writer) {
	t.Helper()
	writer := sqlutil.NewExclusiveWriter()
	db, err := sqlutil.Open(&config.DatabaseOptions{
		ConnectionString: config.DataSource("file:" + filepath.Join(t.TempDir(), "expiration.db")),
	}, writer)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db, writer
}

// A new database has small pages, and its log is written back after as many bytes as with SQLite's defaults. A database that has tables
// already, for example from a restored dump, keeps its page size.
func TestPages(t *testing.T) {
	for pages, restored := range map[string]bool{"1024": false, "4096": true} {
		db, writer := openDatabase(t)
		db.SetMaxIdleConns(-1) // so that each connection is closed after use, and its settings are lost
		if restored {
			require.NoError(t, shared.CreateSchema(t.Context(), db, tablesSQL, shared.SchemaSQL))
		}
		_, err := Open(t.Context(), db, writer)
		require.NoError(t, err)
		c := newConnection(db, writer)
		require.NoError(t, c.open(t.Context()))
		require.Equal(t, pages, pragma(t, c, "page_size"))
		require.Equal(t, "4000", pragma(t, c, "wal_autocheckpoint"))
		c.close()
	}
}

// A commit must survive a power failure. The drivers' defaults for a write-ahead log do not guarantee that, so the settings must hold on
// every connection, also on the new one after a failed write.
func TestEachCommitIsSynced(t *testing.T) {
	db, writer := openDatabase(t)
	require.NoError(t, shared.CreateSchema(t.Context(), db, tablesSQL, shared.SchemaSQL))
	c := newConnection(db, writer)
	exec := func(query string) error {
		return c.Transaction(t.Context(), func(txn *sql.Tx) error {
			_, err := txn.ExecContext(t.Context(), query)
			return err
		})
	}
	for range 2 {
		require.NoError(t, exec("CREATE TABLE IF NOT EXISTS t (n INTEGER)"))
		require.Equal(t, "wal", pragma(t, c, "journal_mode"))
		require.Equal(t, "2", pragma(t, c, "synchronous"))
		require.Error(t, exec("not SQL"))
		require.Nil(t, c.conn)
	}
	require.NoError(t, exec("INSERT INTO t VALUES (1)"))
	c.close()
}

func pragma(t *testing.T, c *connection, name string) (value string) {
	t.Helper()
	require.NoError(t, c.conn.QueryRowContext(context.Background(), "PRAGMA "+name).Scan(&value))
	return value
}

// After Close, the database file alone has all timers, and the files beside it are gone.
func TestClose(t *testing.T) {
	db, writer := openDatabase(t)
	store, err := Open(t.Context(), db, writer)
	require.NoError(t, err)
	insert := func() error {
		return store.Insert(t.Context(), expiration.Timer{NID: 1, Event: expiration.Event{ID: "$event"}, Duration: time.Hour}, expiration.Digest{})
	}
	require.NoError(t, insert())
	name := path(t, db)
	require.NotEqual(t, 1, timersIn(t, name), "the timer must be in the log alone, or the test shows nothing")

	require.NoError(t, store.Close())
	require.Equal(t, 1, timersIn(t, name))
	require.ErrorIs(t, insert(), errClosed)
	require.ErrorIs(t, store.Ping(t.Context()), errClosed)
	require.NoError(t, store.Close(), "twice")
	require.NoError(t, db.Close())
	left, err := filepath.Glob(name + "*")
	require.NoError(t, err)
	require.Equal(t, []string{name}, left)
}

// A Ping whose context ends does not wait for a writer that hangs. Many such Pings do not pile up goroutines.
func TestPingGivesUp(t *testing.T) {
	db, writer := openDatabase(t)
	store, err := Open(t.Context(), db, writer)
	require.NoError(t, err)
	hung, held := make(chan struct{}), make(chan struct{})
	go func() {
		_ = writer.Do(nil, nil, func(*sql.Tx) error {
			close(held)
			<-hung
			return nil
		})
	}()
	<-held
	before := runtime.NumGoroutine()
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		require.ErrorIs(t, store.Ping(ctx), context.DeadlineExceeded)
		cancel()
	}
	require.Less(t, runtime.NumGoroutine()-before, 10)
	close(hung)
	require.NoError(t, store.Ping(t.Context()))
}

// Ping fails if the database can only be read.
func TestPingNoticesThatNothingCanBeWritten(t *testing.T) {
	db, writer := openDatabase(t)
	require.NoError(t, shared.CreateSchema(t.Context(), db, tablesSQL, shared.SchemaSQL))
	c := newConnection(db, writer)
	require.NoError(t, c.Ping(t.Context()))
	require.NoError(t, c.use(t.Context(), func(conn *sql.Conn) error { return set(t.Context(), conn, "query_only = ON") }))
	require.Error(t, c.Ping(t.Context()))
}

// path returns the path of the database file.
func path(t *testing.T, db *sql.DB) (name string) {
	t.Helper()
	require.NoError(t, db.QueryRow("SELECT file FROM pragma_database_list").Scan(&name))
	return name
}

// timersIn returns the number of timers in a copy of the database file alone, or -1 if the copy has no tables.
func timersIn(t *testing.T, name string) (n int) {
	t.Helper()
	data, err := os.ReadFile(name)
	require.NoError(t, err)
	copied := filepath.Join(t.TempDir(), "copy.db")
	require.NoError(t, os.WriteFile(copied, data, 0o600))
	db, err := sql.Open(sqlutil.SQLITE_DRIVER_NAME, copied)
	require.NoError(t, err)
	defer db.Close()
	if db.QueryRow("SELECT COUNT(*) FROM expiration_timers").Scan(&n) != nil {
		return -1
	}
	return n
}

// A connection on which an error has left a transaction open is closed, and not used again. One that a write was rolled back on, because
// its condition did not hold, is kept.
func TestConnectionAfterAnError(t *testing.T) {
	db, writer := openDatabase(t)
	require.NoError(t, shared.CreateSchema(t.Context(), db, tablesSQL, shared.SchemaSQL))
	c := newConnection(db, writer)
	failed := errors.New("rolling back failed")
	fail := func(err error) error {
		return c.use(t.Context(), func(conn *sql.Conn) error {
			_, begun := conn.ExecContext(t.Context(), "BEGIN IMMEDIATE")
			require.NoError(t, begun)
			return err
		})
	}
	require.ErrorIs(t, fail(failed), failed)
	require.Zero(t, db.Stats().InUse)
	require.NoError(t, c.Ping(t.Context()), "a transaction is open")
	conn := c.conn
	require.ErrorIs(t, fail(sql.ErrNoRows), sql.ErrNoRows)
	require.Same(t, conn, c.conn)
	require.Error(t, c.Ping(t.Context()))
	require.NoError(t, c.Ping(t.Context()))
}

// A panic while the connection is opened is the error of that write.
func TestPanicWhileOpening(t *testing.T) {
	c := newConnection(nil, sqlutil.NewExclusiveWriter())
	require.ErrorIs(t, c.Ping(t.Context()), errPanicked)
}
