package dendritefix

import (
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
)

const (
	// keptConnections is how many idle connections to an SQLite database stay open, and keptFor is for how long. Each connection caches up
	// to two megabytes of the database.
	keptConnections = 8
	keptFor         = time.Minute
)

// KeepConnections keeps idle connections to SQLite databases open. Dendrite's setting for that applies only to PostgreSQL, so Go keeps two.
// When more than two queries run at once, each of the others opens the file, reads the schema and plans its statements anew. A writer that
// does so delays all other writers. See docs/performance.md, "Mass expiry".
//
// This file can go when Dendrite applies max_idle_conns to SQLite too.
func KeepConnections(cm *sqlutil.Connections, databases ...*config.DatabaseOptions) error {
	for _, options := range databases {
		if !options.ConnectionString.IsSQLite() {
			continue
		}
		db, _, err := cm.Connection(options)
		if err != nil {
			return err
		}
		if db == nil { // a component of Dendrite failed to open it, and has logged that
			return fmt.Errorf("%s is not open", options.ConnectionString)
		}
		db.SetMaxIdleConns(keptConnections)
		db.SetConnMaxIdleTime(keptFor)
	}
	return nil
}
