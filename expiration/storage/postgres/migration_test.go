package postgres

import (
	"database/sql"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/storagetest"
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

// A database of an earlier version keeps its timers.
func TestMigration(t *testing.T) {
	db := newDatabase(t)
	storagetest.Migration(t, db, migrations)
	store, err := Open(t.Context(), db)
	require.NoError(t, err)
	storagetest.Migrated(t, store)
}
