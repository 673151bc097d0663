package shared

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// schemaVersion is the version of the tables. A release that changes a table raises it, and migrates from the versions before.
const schemaVersion = 1

// The version is the one row of a table of its own.
const (
	createVersionSQL = "CREATE TABLE IF NOT EXISTS expiration_schema (version INTEGER NOT NULL)"
	selectVersionSQL = "SELECT version FROM expiration_schema"
	insertVersionSQL = "INSERT INTO expiration_schema (version) VALUES ($1)"
)

// errNoVersion is the error for tables that were made before tables had a version, by a server that was never released.
var errNoVersion = errors.New("its tables were made by a version from before the first release, which this version cannot read:" +
	" go on with that version, or give up its timers and drop all tables whose names begin with expiration_ (SQLite: delete the file)")

// CreateSchema makes the tables that are missing, all or none. It refuses tables of another version and leaves them as they are.
// tablesSQL returns how many tables of ours there are, and schemaSQL makes them.
func CreateSchema(ctx context.Context, db *sql.DB, tablesSQL, schemaSQL string) error {
	txn, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	return Commit(txn, func(txn *sql.Tx) error {
		var tables, version int
		if err := txn.QueryRowContext(ctx, tablesSQL).Scan(&tables); err != nil {
			return err
		}
		if _, err := txn.ExecContext(ctx, createVersionSQL); err != nil {
			return err
		}
		err := txn.QueryRowContext(ctx, selectVersionSQL).Scan(&version)
		switch {
		case errors.Is(err, sql.ErrNoRows) && tables > 0:
			return errNoVersion
		case errors.Is(err, sql.ErrNoRows):
			_, err = txn.ExecContext(ctx, insertVersionSQL, schemaVersion)
		case err == nil && version != schemaVersion:
			err = fmt.Errorf("its tables have version %d, and this server needs version %d: start the server that made them",
				version, schemaVersion)
		}
		if err == nil {
			_, err = txn.ExecContext(ctx, schemaSQL)
		}
		return err
	})
}
