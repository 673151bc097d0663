package storage_test

import (
	"database/sql"
	"path/filepath"
	"slices"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

func TestMain(m *testing.M) { postgres.Main(m) }

func TestSQLite(t *testing.T) { conforms(t, newSQLite) }

func TestPostgreSQL(t *testing.T) { conforms(t, postgres.NewDatabase) }

func newSQLite(t testing.TB) (dsn string) {
	return "file:" + filepath.Join(t.TempDir(), "expiration.db")
}

// conforms runs the suite. newDatabase makes an empty database.
func conforms(t *testing.T, newDatabase func(testing.TB) (dsn string)) {
	for _, test := range slices.Concat(expiringTests, delayedTests, delegationTests, participantTests) {
		t.Run(test.name, func(t *testing.T) {
			dsn := newDatabase(t)
			test.run(t, func() expiration.Store {
				_, open := connect(t, dsn)
				store, err := open()
				require.NoError(t, err)
				return store
			})
		})
	}
	t.Run("RefusesOtherTables", func(t *testing.T) {
		db, open := connect(t, newDatabase(t))
		refusesOtherTables(t, db, open)
	})
	t.Run("NumbersAreUsedAgain", func(t *testing.T) {
		db, open := connect(t, newDatabase(t))
		numbersAreUsedAgain(t, db, open)
	})
}

// connect returns connections to a database, and a function that opens a store which uses them.
func connect(t *testing.T, dsn string) (db *sql.DB, open func() (expiration.Store, error)) {
	t.Helper()
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
	options.Defaults(10)
	cm := sqlutil.NewConnectionManager(nil, config.DatabaseOptions{})
	db, _, err := cm.Connection(options)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db, func() (expiration.Store, error) { return storage.Open(t.Context(), cm, options) }
}
