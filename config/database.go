package config

import (
	"fmt"
	"path"
	"slices"

	"github.com/matrix-org/dendrite/setup/config"
)

// resolveDatabase decides which database is used, given the rest of Dendrite's configuration.
func (c *Config) resolveDatabase(cfg *config.Dendrite) error {
	own, global := &c.Database, &cfg.Global.DatabaseOptions
	roomserver := &cfg.RoomServer.Database
	switch {
	case own.ConnectionString != "":
		if own.ConnectionString.IsSQLite() && sharesSQLite(own.ConnectionString, cfg) {
			return fmt.Errorf("config key %q: the SQLite file is another component's; this one needs its own",
				"expiration.database.connection_string")
		}
	case global.ConnectionString.IsPostgres() && global.ConnectionString != "":
		*own = config.DatabaseOptions{} // the connection manager uses the global one
	case global.ConnectionString != "":
		own.ConnectionString = besideSQLite(global.ConnectionString)
	case roomserver.ConnectionString.IsSQLite():
		own.ConnectionString = besideSQLite(roomserver.ConnectionString)
	default:
		*own = *roomserver
	}
	return nil
}

// sqliteFile is the name of our own database.
const sqliteFile = "dendrite_expiration.db"

// besideSQLite returns an SQLite file of our own, in the folder of another one.
func besideSQLite(other config.DataSource) config.DataSource {
	dir, _ := path.Split(string(other))
	if dir == "" {
		dir = "file:"
	}
	return config.DataSource(dir + sqliteFile)
}

func sharesSQLite(own config.DataSource, cfg *config.Dendrite) bool {
	return slices.ContainsFunc(Databases(cfg), func(other config.DatabaseOptions) bool { return other.ConnectionString == own })
}

// Databases returns the databases of Dendrite's components.
func Databases(cfg *config.Dendrite) []config.DatabaseOptions {
	return []config.DatabaseOptions{
		cfg.Global.DatabaseOptions, cfg.FederationAPI.Database, cfg.KeyServer.Database, cfg.MediaAPI.Database,
		cfg.RoomServer.Database, cfg.SyncAPI.Database, cfg.UserAPI.AccountDatabase, cfg.RelayAPI.Database, cfg.MSCs.Database,
	}
}
