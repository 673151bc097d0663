package config

import (
	"testing"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"
)

func TestWhichDatabase(t *testing.T) {
	sqlite := func(c *config.Dendrite) {
		c.RoomServer.Database.ConnectionString = "file:/var/lib/dendrite_roomserver.db"
	}
	for name, test := range map[string]struct {
		own  config.DataSource
		rest func(*config.Dendrite)
		want config.DataSource
	}{
		"its own":           {"file:mine.db", sqlite, "file:mine.db"},
		"beside the others": {"", sqlite, "file:/var/lib/dendrite_expiration.db"},
		"in the current folder": {"", func(c *config.Dendrite) { c.RoomServer.Database.ConnectionString = "file:roomserver.db" },
			"file:dendrite_expiration.db"},
		"the global one": {"", func(c *config.Dendrite) {
			c.Global.DatabaseOptions.ConnectionString = "postgres://host/dendrite"
		}, ""},
		"beside a global SQLite file": {"", func(c *config.Dendrite) {
			c.Global.DatabaseOptions.ConnectionString = "file:///data/all.db"
		}, "file:///data/dendrite_expiration.db"},
		"the roomserver's": {"", func(c *config.Dendrite) {
			c.RoomServer.Database.ConnectionString = "postgres://host/roomserver"
		}, "postgres://host/roomserver"},
	} {
		t.Run(name, func(t *testing.T) {
			var (
				rest config.Dendrite
				c    Config
			)
			c.Defaults()
			c.Database.ConnectionString = test.own
			test.rest(&rest)
			require.NoError(t, c.resolveDatabase(&rest))
			require.Equal(t, test.want, c.Database.ConnectionString)
		})
	}
	var rest config.Dendrite
	sqlite(&rest)
	c := Config{Database: rest.RoomServer.Database}
	require.ErrorContains(t, c.resolveDatabase(&rest), "expiration.database.connection_string", "one file for two")
}
