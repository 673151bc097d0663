package dendritefix

import (
	"database/sql"
	"path/filepath"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"
)

// A burst of queries opens no new connections if there was another burst shortly before.
func TestKeepConnections(t *testing.T) {
	options := &config.DatabaseOptions{ConnectionString: config.DataSource("file:" + filepath.Join(t.TempDir(), "a.db"))}
	cm := sqlutil.NewConnectionManager(nil, config.DatabaseOptions{})
	require.NoError(t, KeepConnections(cm, options, &config.DatabaseOptions{ConnectionString: "postgres://nowhere"}, &config.DatabaseOptions{}))
	db, _, err := cm.Connection(options)
	require.NoError(t, err)
	defer db.Close()
	var open []*sql.Conn
	for range keptConnections {
		conn, err := db.Conn(t.Context())
		require.NoError(t, err)
		open = append(open, conn)
	}
	for _, conn := range open {
		require.NoError(t, conn.Close())
	}
	require.Equal(t, keptConnections, db.Stats().Idle)

	bad := &config.DatabaseOptions{ConnectionString: "file:"}
	require.Error(t, KeepConnections(cm, bad))
	require.ErrorContains(t, KeepConnections(cm, bad), "not open")
}
