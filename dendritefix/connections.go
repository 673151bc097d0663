package dendritefix

import (
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
)

const (
	// keptConnections is how many connections to an SQLite database are kept when nobody needs them, and keptFor for how long. Each
	// has up to two megabytes of the database in memory.
	keptConnections = 8
	keptFor         = time.Minute
)

// KeepConnections has connections to SQLite databases kept. Dendrite lets an operator say how many only for PostgreSQL, and Go keeps
// two. As soon as more than two things happen at once, the others open the file, read the schema and plan their statements, each
// time; and what writes holds up all that wants to write meanwhile. See docs/performance.md, "Mass expiry".
func KeepConnections(cm *sqlutil.Connections, databases ...*config.DatabaseOptions) error {
	for _, options := range databases {
		if !options.ConnectionString.IsSQLite() {
			continue
		}
		db, _, err := cm.Connection(options)
		if err != nil {
			return err
		}
		if db == nil { // a component failed to open it, and has said so
			return fmt.Errorf("%s is not open", options.ConnectionString)
		}
		db.SetMaxIdleConns(keptConnections)
		db.SetConnMaxIdleTime(keptFor)
	}
	return nil
}
