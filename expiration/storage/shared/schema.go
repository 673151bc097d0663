package shared

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// schemaVersion is the version of the tables. A release that changes a table must raise it, and migrate tables of earlier versions.
const schemaVersion = 1

// allTables is the number of tables, with that of the version.
const allTables = 6

// The version is stored in a table of its own, which has one row.
const (
	createVersionSQL = "CREATE TABLE IF NOT EXISTS expiration_schema (version INTEGER NOT NULL)"
	selectVersionSQL = "SELECT version FROM expiration_schema"
	insertVersionSQL = "INSERT INTO expiration_schema (version) VALUES ($1)"
)

// errNoVersion is the error for tables without a version. Only servers from before the first release made such tables.
var errNoVersion = errors.New("its tables were made by a version from before the first release, which this version cannot read:" +
	" go on with that version, or give up its timers and drop all tables whose names begin with expiration_ (SQLite: delete the file)")

// CreateSchema makes the tables in one transaction, if they are missing. It refuses tables of another version and leaves them unchanged. tablesSQL
// counts the existing tables whose names begin with expiration_, and schemaSQL makes the tables.
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
		case err == nil && version != schemaVersion:
			return fmt.Errorf("its tables have version %d, and this server needs version %d: start the server that made them",
				version, schemaVersion)
		case errors.Is(err, sql.ErrNoRows):
			_, err = txn.ExecContext(ctx, insertVersionSQL, schemaVersion)
		case tables == allTables: // to make them again would lock them, which a server that writes them can run into
			return err
		}
		if err == nil {
			_, err = txn.ExecContext(ctx, schemaSQL)
		}
		return err
	})
}
