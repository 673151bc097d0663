package sqlite3

import (
	"path/filepath"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/storagetest"
)

// A database of an earlier version keeps its timers.
func TestMigration(t *testing.T) {
	writer := sqlutil.NewExclusiveWriter()
	db, err := sqlutil.Open(&config.DatabaseOptions{
		ConnectionString: config.DataSource("file:" + filepath.Join(t.TempDir(), "expiration.db")),
	}, writer)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	storagetest.Migration(t, db, migrations)
	store, err := Open(t.Context(), db, writer)
	require.NoError(t, err)
	storagetest.Migrated(t, store)
}
