package storage_test

import (
	"path/filepath"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/storagetest"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

func TestMain(m *testing.M) { postgres.Main(m) }

func TestSQLite(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) func() expiration.Store {
		return reopen(t, "file:"+filepath.Join(t.TempDir(), "expiration.db"))
	})
}

func TestPostgreSQL(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) func() expiration.Store {
		return reopen(t, postgres.NewDatabase(t))
	})
}

// reopen returns a function that opens the database again, with its own connections and prepared statements.
func reopen(t *testing.T, dsn string) func() expiration.Store {
	return func() expiration.Store {
		options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
		options.Defaults(10)
		cm := sqlutil.NewConnectionManager(nil, config.DatabaseOptions{})
		db, _, err := cm.Connection(options)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, db.Close()) })
		store, err := storage.Open(t.Context(), cm, options)
		require.NoError(t, err)
		return store
	}
}
