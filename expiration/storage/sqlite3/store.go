// Package sqlite3 keeps timers in an SQLite database.
package sqlite3

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

const (
	// pageSize is the size of the pages of a new database, in bytes. It is small because timers that are refreshed together are mostly in
	// different pages, and SQLite writes whole pages into the log. With SQLite's default of 4096 bytes, that takes most of the time of a
	// commit.
	pageSize = 1024
	// checkpointPages is the number of pages in the log after which SQLite writes them back. That is 4 MB, as with SQLite's defaults.
	checkpointPages = 4000
)

// tablesSQL counts the existing tables whose names begin with expiration_.
const tablesSQL = `SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name LIKE 'expiration\_%' ESCAPE '\'`

// Open makes the missing tables, and returns the store. None of Dendrite's components may use the same database.
func Open(ctx context.Context, db *sql.DB, writer sqlutil.Writer) (*shared.Store, error) {
	if err := create(ctx, db); err != nil {
		return nil, err
	}
	if err := shared.CreateSchema(ctx, db, tablesSQL, shared.SchemaSQL); err != nil {
		return nil, err
	}
	return shared.New(db, newConnection(db, writer))
}

// create makes the database with pages of pageSize, if it is empty. A database that has tables keeps its page size.
func create(ctx context.Context, db *sql.DB) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return set(ctx, conn, fmt.Sprintf("page_size = %d", pageSize), writeAhead) // writeAhead makes SQLite write the first page
}

// writeAhead is the setting for a write-ahead log.
const writeAhead = "journal_mode = WAL"

// set sets pragmas of the database or of a connection.
func set(ctx context.Context, conn *sql.Conn, settings ...string) error {
	for _, setting := range settings {
		if _, err := conn.ExecContext(ctx, "PRAGMA "+setting); err != nil {
			return fmt.Errorf("setting %s: %w", setting, err)
		}
	}
	return nil
}

// connection implements shared.Database. It does all writes on one connection, because the settings that make a commit durable belong to a
// connection. Neither database/sql nor Dendrite has a way to set them for all connections of the pool.
type connection struct {
	db     *sql.DB
	writer sqlutil.Writer // runs one function at a time

	// pinging is a lock. It is held by the one Ping that waits for writer.
	pinging chan struct{}

	// The fields below are used only inside writer. conn and refresh are nil before the first write and after an error.
	conn    *sql.Conn
	refresh *sql.Stmt // refreshTimersSQL, prepared on conn
	closed  bool
}

func newConnection(db *sql.DB, writer sqlutil.Writer) *connection {
	return &connection{db: db, writer: writer, pinging: make(chan struct{}, 1)}
}

// errClosed is the error of writes after Close.
var errClosed = errors.New("the database of the timers is closed")

// use calls f with the connection, which it opens if necessary. Only one f runs at a time. After an error the connection is closed, because a
// transaction may be open on it. sql.ErrNoRows is no such error.
func (c *connection) use(ctx context.Context, f func(*sql.Conn) error) error {
	return c.writer.Do(nil, nil, func(*sql.Tx) error {
		if c.closed {
			return errClosed
		}
		err := errPanicked
		// A panic must not end the process: writer runs this function in a goroutine of its own.
		guard.Run("writing timers", func() {
			if err = c.open(ctx); err == nil {
				err = errPanicked
				err = f(c.conn)
			}
		})
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			c.close()
		}
		return err
	})
}

var errPanicked = errors.New("writing timers panicked")

func (c *connection) Transaction(ctx context.Context, f func(*sql.Tx) error) error {
	return c.use(ctx, func(conn *sql.Conn) error {
		txn, err := conn.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		return shared.Commit(txn, f)
	})
}

const (
	insertDigestSQL   = "INSERT INTO expiration_digests (timer_nid, digest) VALUES ($1, $2)"
	insertDeadlineSQL = "INSERT INTO expiration_deadlines (timer_nid, duration_ms, deadline_ms) VALUES ($1, $2, $3)"
)

func (c *connection) Insert(ctx context.Context, values []any, d expiration.Digest, duration, deadline int64) error {
	nid := values[0]
	return c.Transaction(ctx, func(txn *sql.Tx) error {
		for _, insert := range []struct {
			query string
			args  []any
		}{
			{shared.InsertTimerSQL, values},
			{insertDigestSQL, []any{nid, d[:]}},
			{insertDeadlineSQL, []any{nid, duration, deadline}},
		} {
			if _, err := txn.ExecContext(ctx, insert.query, insert.args...); err != nil {
				return err
			}
		}
		return nil
	})
}

const (
	deleteDeadlinesSQL = "DELETE FROM expiration_deadlines WHERE timer_nid IN (SELECT value FROM json_each($1))"
	// spareClaimedSQL is appended to deleteDeadlinesSQL if only running timers may be removed.
	spareClaimedSQL = " AND outcome IS NULL"
	// deleteRestSQL deletes from another table the rows of those timers that no longer have a row in expiration_deadlines.
	deleteRestSQL = "DELETE FROM %s AS t WHERE timer_nid IN (SELECT value FROM json_each($1))" +
		" AND NOT EXISTS (SELECT 1 FROM expiration_deadlines AS d WHERE d.timer_nid = t.timer_nid)"
)

func (c *connection) Remove(ctx context.Context, txn *sql.Tx, nids []int64, running bool) (n int64, err error) {
	if txn == nil {
		err = c.Transaction(ctx, func(txn *sql.Tx) error {
			n, err = c.Remove(ctx, txn, nids, running)
			return err
		})
		return n, err
	}
	deadlines, values := deleteDeadlinesSQL, c.Values(nids)
	if running {
		deadlines += spareClaimedSQL
	}
	res, err := txn.ExecContext(ctx, deadlines, values)
	if err != nil {
		return 0, err
	}
	for _, table := range []string{"expiration_timers", "expiration_digests", "expiration_claims", "expiration_delegations"} {
		if _, err = txn.ExecContext(ctx, fmt.Sprintf(deleteRestSQL, table), values); err != nil {
			return 0, err
		}
	}
	return res.RowsAffected()
}

func (c *connection) Among(column, parameter string) string {
	return column + " IN (SELECT value FROM json_each(" + parameter + "))"
}

// Values implements shared.Database. It returns an array for json_each.
func (c *connection) Values(slice any) any {
	data, _ := json.Marshal(slice) // never fails for numbers and strings
	return string(data)
}

const (
	// All refreshes are one statement, and so one commit. The parameter is an array of arrays.
	refreshTimersSQL = "UPDATE expiration_deadlines SET duration_ms = r.value ->> 1, deadline_ms = r.value ->> 2" +
		" FROM json_each($1) AS r WHERE timer_nid = r.value ->> 0 AND outcome IS NULL"
	// The refreshed timers are looked up only if fewer timers were refreshed than expected. To return each row would take as long as to
	// change it.
	selectRunningSQL = "SELECT timer_nid FROM expiration_deadlines JOIN json_each($1) AS r ON timer_nid = r.value ->> 0" +
		" WHERE outcome IS NULL"
)

func (c *connection) Refresh(ctx context.Context, refreshes []expiration.Refresh, found func(nid int64)) error {
	values := make([][3]int64, len(refreshes))
	for i, r := range refreshes {
		values[i] = [3]int64{r.NID, r.Duration.Milliseconds(), r.Deadline.UnixMilli()}
	}
	data := c.Values(values)
	if err := ctx.Err(); err != nil {
		return err
	}
	// With a context that can end, the driver runs each statement in another goroutine and waits for it. That gains nothing: most of the
	// time is the disk's, which cannot be interrupted.
	ctx = context.WithoutCancel(ctx)
	return c.use(ctx, func(conn *sql.Conn) error {
		res, err := c.refresh.ExecContext(ctx, data)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err == nil && n == int64(len(refreshes)) {
			for _, r := range refreshes {
				found(r.NID)
			}
			return nil
		}
		rows, err := conn.QueryContext(ctx, selectRunningSQL, data)
		if err != nil {
			return err
		}
		return shared.ScanNIDs(ctx, rows, found)
	})
}

const (
	claimTimerSQL = "UPDATE expiration_deadlines SET outcome = $1" +
		" WHERE timer_nid = $2 AND deadline_ms = $3 AND outcome IS NULL"
	insertClaimSQL = "INSERT INTO expiration_claims (timer_nid, event_id, room_version, pdu) VALUES ($1, $2, $3, $4)"
)

// Claim implements shared.Database. It writes one event after another. To encode all events as one JSON value, and decode it again, would
// take longer.
func (c *connection) Claim(ctx context.Context, claims []expiration.ConditionalClaim, found func(nid int64)) error {
	return c.Transaction(ctx, func(txn *sql.Tx) error {
		claimTimer, err := txn.PrepareContext(ctx, claimTimerSQL)
		if err != nil {
			return err
		}
		insertClaim, err := txn.PrepareContext(ctx, insertClaimSQL)
		if err != nil {
			return err
		}
		for _, claim := range claims {
			res, err := claimTimer.ExecContext(ctx, string(claim.Outcome), claim.NID, claim.Deadline.UnixMilli())
			if err != nil {
				return err
			}
			if n, err := res.RowsAffected(); err != nil || n == 0 {
				continue
			}
			if _, err = insertClaim.ExecContext(ctx,
				claim.NID, claim.Event.EventID, claim.Event.RoomVersion, claim.Event.PDU); err != nil {
				return err
			}
			found(claim.NID)
		}
		return nil
	})
}

// open opens a connection whose commits survive a power failure, if none is open. With a write-ahead log a commit needs one sync instead of
// two, but the driver's default is then not to sync at all. A refresh is prepared, because it can run a thousand times a second.
func (c *connection) open(ctx context.Context) (err error) {
	if c.refresh != nil {
		return nil
	}
	if c.conn, err = c.db.Conn(ctx); err != nil {
		return err
	}
	err = set(ctx, c.conn, writeAhead, "synchronous = FULL", fmt.Sprintf("wal_autocheckpoint = %d", checkpointPages))
	if err != nil {
		return err
	}
	c.refresh, err = c.conn.PrepareContext(ctx, refreshTimersSQL)
	return err
}

// Ping implements shared.Database. It begins a write transaction and rolls it back. A writer that hangs cannot be interrupted. So only one
// Ping waits for the writer, and the others wait for that Ping until their contexts end.
func (c *connection) Ping(ctx context.Context) error {
	select {
	case c.pinging <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	return within(ctx, func() error {
		defer func() { <-c.pinging }()
		// The transaction would stay open if the context ended between the two statements.
		ctx := context.WithoutCancel(ctx)
		return c.use(ctx, func(conn *sql.Conn) error {
			if _, err := conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
				return err
			}
			_, err := conn.ExecContext(ctx, "ROLLBACK")
			return err
		})
	})
}

// within returns the error of f, or that of the context if it ends first; f then goes on in the background.
func within(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// closePatience is how long Close waits for writes and reads in progress.
const closePatience = 10 * time.Second

// Close implements shared.Database. It moves everything from the log into the database file, so that a copy of that file alone has all
// timers. SQLite does the same when the last connection is closed. But the pool cannot close this connection, which is in use, and the
// process may end before the pool has closed the others.
func (c *connection) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	return within(ctx, func() error {
		return c.writer.Do(nil, nil, func(*sql.Tx) error {
			c.closed = true
			if c.conn == nil {
				return nil // nothing was written; the log of an earlier process is moved when the pool's last connection is closed
			}
			defer c.close()
			var busy, logged, moved int // busy is 0 or 1; the others count pages
			err := c.conn.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &logged, &moved)
			if err == nil && busy != 0 {
				err = fmt.Errorf("a reader is still active: %d of %d pages are in the database file", moved, logged)
			}
			return err
		})
	})
}

// close closes the connection, if there is one. sql.Conn.Close would return it to the pool, with whatever state the error has left it in.
func (c *connection) close() {
	if c.refresh != nil {
		_ = c.refresh.Close()
	}
	if c.conn != nil {
		_ = c.conn.Raw(func(any) error { return driver.ErrBadConn })
	}
	c.conn, c.refresh = nil, nil
}
