package sqlite3

import (
	"context"
	"database/sql"
	"path/filepath"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/storagetest"
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

// A database of an earlier version keeps its timers.
func TestMigration(t *testing.T) {
	db, writer := openDatabase(t)
	storagetest.Migration(t, db, migrations)
	store, err := Open(t.Context(), db, writer)
	require.NoError(t, err)
	storagetest.Migrated(t, store)
}

// A new database has small pages, and the log is written back as often as with large ones. An older database stays as it is.
func TestPages(t *testing.T) {
	for _, old := range []bool{false, true} {
		db, writer := openDatabase(t)
		db.SetMaxIdleConns(-1) // what one connection was told, no other knows
		if old {
			storagetest.Migration(t, db, migrations)
		}
		store, err := Open(t.Context(), db, writer)
		require.NoError(t, err)
		c := store.Writer.(*connection)
		require.NoError(t, c.open(t.Context()))
		if old {
			require.Equal(t, "4096", pragma(t, c, "page_size"))
		} else {
			require.Equal(t, "1024", pragma(t, c, "page_size"))
		}
		require.Equal(t, "4000", pragma(t, c, "wal_autocheckpoint"))
		c.close()
	}
}

// A commit must survive a power failure: the drivers' own defaults for the write-ahead log do not promise it. After a
// failed write the connection is another one, and the same must hold.
func TestEachCommitIsSynced(t *testing.T) {
	db, writer := openDatabase(t)
	require.NoError(t, shared.Migrate(t.Context(), db, migrations...))
	c := &connection{db: db, writer: writer}
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
