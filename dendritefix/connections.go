package dendritefix

import (
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
)

const (
	// keptConnections is how many idle connections to an SQLite database stay open, and keptFor for how long. Each has up to two megabytes of
	// the database in memory.
	keptConnections = 8
	keptFor         = time.Minute
)

// KeepConnections keeps idle connections to SQLite databases open. Dendrite's setting for that counts only for PostgreSQL, so Go
// keeps two. When more than two queries run at once, each of the others opens the file, reads the schema and plans its statements
// anew. A writer that does so delays all other writers. See docs/performance.md, "Mass expiry".
//
// This file can go when Dendrite's max_idle_conns counts for SQLite too.
func KeepConnections(cm *sqlutil.Connections, databases ...*config.DatabaseOptions) error {
	for _, options := range databases {
		if !options.ConnectionString.IsSQLite() {
			continue
		}
		db, _, err := cm.Connection(options)
		if err != nil {
			return err
		}
		if db == nil { // a component failed to open it, and has logged that
			return fmt.Errorf("%s is not open", options.ConnectionString)
		}
		db.SetMaxIdleConns(keptConnections)
		db.SetConnMaxIdleTime(keptFor)
	}
	return nil
}
