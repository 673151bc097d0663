// Package storage opens the database of the timers.
package storage

import (
	"context"
	"fmt"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/postgres"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/sqlite3"
)

// Open opens the database that the options name, or the global database if they name none. It makes the missing tables.
func Open(ctx context.Context, cm *sqlutil.Connections, options *config.DatabaseOptions) (*shared.Store, error) {
	db, writer, err := cm.Connection(options)
	if err != nil {
		return nil, err
	}
	if db == nil { // because another component failed to open the same database
		return nil, fmt.Errorf("the database is not open")
	}
	if options.ConnectionString.IsSQLite() {
		return sqlite3.Open(ctx, db, writer)
	}
	return postgres.Open(ctx, db)
}
