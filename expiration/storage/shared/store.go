// Package shared is the one implementation of expiration.Store. The SQL is the same for SQLite and PostgreSQL; what is
// not (types of columns, and how a write is made durable) stands in the packages beside this one.
//
// A timer is a row in three tables. The event is in expiration_timers, and takes one to two kilobytes; what a refresh writes is in
// expiration_deadlines, and takes thirty bytes, so that a batch of refreshes writes a few pages and not one for each; what else the
// start reads is in expiration_digests, so that it need not go through the events; a timer that has no row there is one of which
// somebody doubted that its event is still the current state. Whether the timer runs is decided by its
// deadline's row: outcome is NULL while it does, and without the row there is no timer. When it is claimed, the event that is sent
// comes into expiration_claims.
package shared

import (
	"context"
	"database/sql"
	"fmt"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/internal"
	"github.com/matrix-org/dendrite/internal/sqlutil"
	"golang.org/x/sync/errgroup"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Parameters stand in the order of their numbers: SQLite counts them by where they first appear.
const (
	InsertTimerSQL = "INSERT INTO expiration_timers" +
		" (timer_nid, event_id, room_id, event_type, state_key, sender, token_hash, received_ms," +
		" request_hash, room_version, pdu, content, expires_ms, origin_server_ts, over_event_id, exempt)" +
		" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
	readTimersSQL = "SELECT " + columns + fromTimersSQL + " WHERE "
	readClaimsSQL = "SELECT timer_nid, event_id, room_version, pdu FROM expiration_claims WHERE "
	// The range is given twice, because PostgreSQL does not conclude from the join that it holds on both sides.
	selectIndexSQL = "SELECT d.timer_nid, g.digest, d.outcome IS NOT NULL, d.duration_ms, d.deadline_ms" +
		" FROM expiration_deadlines AS d LEFT JOIN expiration_digests AS g" +
		" ON g.timer_nid = d.timer_nid AND g.timer_nid BETWEEN $1 AND $2 WHERE d.timer_nid BETWEEN $1 AND $2"
	fromTimersSQL  = " FROM expiration_timers AS t JOIN expiration_deadlines AS d ON d.timer_nid = t.timer_nid"
	selectRangeSQL = "SELECT COALESCE(MIN(timer_nid), 1), COALESCE(MAX(timer_nid), 0) FROM expiration_deadlines"
	doubtTimersSQL = "DELETE FROM expiration_digests WHERE "
	pingSQL        = "SELECT COUNT(*) FROM (SELECT 1 FROM expiration_timers LIMIT 1) AS timers"
)

// readersAtStart is how many connections read all timers.
const readersAtStart = 4

// Writer is what differs between the databases. What it has written when it returns is durable.
type Writer interface {
	// Transaction calls f once, with a transaction that it must not end.
	Transaction(ctx context.Context, f func(*sql.Tx) error) error
	// Insert adds the rows of a timer. The values are those of InsertTimerSQL, the first is the timer's number; duration and
	// deadline are in milliseconds.
	Insert(ctx context.Context, values []any, d expiration.Digest, duration, deadline int64) error
	// Remove deletes all rows of timers, of running ones only if running is set, and returns how many timers there were. Without a
	// transaction it is one by itself.
	Remove(ctx context.Context, txn *sql.Tx, nids []int64, running bool) (int64, error)
	// Refresh and Claim change timers that are as they must be, and call found for each of them.
	Refresh(ctx context.Context, refreshes []expiration.Refresh, found func(nid int64)) error
	Claim(ctx context.Context, claims []expiration.ConditionalClaim, found func(nid int64)) error
	// Ping returns an error if nothing can be written now. It writes nothing.
	Ping(ctx context.Context) error
	// Close makes the database whole for whoever copies it. After that nothing can be written.
	Close() error
}

// Many is how a database is given any number of values as one parameter.
type Many struct {
	// Among returns the condition that a column has one of the values of a parameter.
	Among func(column, parameter string) string
	// Value returns what the parameter is for a slice.
	Value func(values any) any
}

// Store implements expiration.Store.
type Store struct {
	// DB is for reading what is read rarely, Statements for the rest.
	DB         *sql.DB
	Statements *Statements
	Writer     Writer
	Many       Many
}

var _ expiration.Store = (*Store)(nil)

// Migration is one step from an empty database to the table as it is now.
type Migration struct {
	// Name is never changed: the database remembers it.
	Name string
	SQL  string
}

// Migrate brings the database up to date, by the steps that it has not yet seen.
func Migrate(ctx context.Context, db *sql.DB, steps ...Migration) error {
	m := sqlutil.NewMigrator(db)
	for _, step := range steps {
		m.AddMigrations(sqlutil.Migration{
			Version: "expiration: " + step.Name,
			Up: func(ctx context.Context, txn *sql.Tx) error {
				_, err := txn.ExecContext(ctx, step.SQL)
				return err
			},
		})
	}
	return m.Up(ctx)
}

func (s *Store) Insert(ctx context.Context, t expiration.Timer, d expiration.Digest) error {
	var (
		request, pdu []byte
		roomVersion  *string
	)
	if r := t.Event.Request; r != nil {
		request, roomVersion, pdu = r.Hash[:], &r.Signed.RoomVersion, r.Signed.PDU
	}
	var delayed expiration.Delayed
	if t.Delayed != nil {
		delayed = *t.Delayed
	}
	return s.Writer.Insert(ctx, []any{
		t.NID, t.Event.ID, t.Event.RoomID, t.Event.Type, t.Event.StateKey, t.Event.Sender, t.TokenHash[:], t.Received.UnixMilli(),
		nullable(request), roomVersion, nullable(pdu), nullable(delayed.Content), delayed.Expires.Milliseconds(),
		storedTimestamp(delayed.Timestamp), delayed.Over, delayed.Exempt,
	}, d, t.Duration.Milliseconds(), t.Deadline.UnixMilli())
}

// nullable stores no bytes as NULL. Versions of lib/pq before 1.11, which a Dendrite tree may have, would store an empty string.
func nullable(data []byte) any {
	if data == nil {
		return nil
	}
	return data
}

func (s *Store) Refresh(ctx context.Context, refreshes []expiration.Refresh) ([]bool, error) {
	return change(ctx, refreshes, func(r expiration.Refresh) int64 { return r.NID }, s.Writer.Refresh)
}

func (s *Store) Claim(ctx context.Context, claims []expiration.ConditionalClaim) ([]bool, error) {
	return change(ctx, claims, func(c expiration.ConditionalClaim) int64 { return c.NID }, s.Writer.Claim)
}

// change writes to several timers and reports for each whether it was found.
func change[W any](
	ctx context.Context, writes []W, nid func(W) int64, write func(context.Context, []W, func(nid int64)) error,
) ([]bool, error) {
	places := make(map[int64]int, len(writes))
	for i, w := range writes {
		places[nid(w)] = i
	}
	found := make([]bool, len(writes))
	err := write(ctx, writes, func(nid int64) { found[places[nid]] = true })
	return found, err
}

// ScanNIDs calls found with the number of each row, and closes the rows.
func ScanNIDs(ctx context.Context, rows *sql.Rows, found func(nid int64)) error {
	return each(ctx, rows, func() error {
		var nid int64
		err := rows.Scan(&nid)
		found(nid)
		return err
	})
}

// each calls f for each row, and closes the rows.
func each(ctx context.Context, rows *sql.Rows, f func() error) error {
	defer internal.CloseAndLogIfError(ctx, rows, "each: rows.close() failed")
	for rows.Next() {
		if err := f(); err != nil {
			return fmt.Errorf("reading a row: %w", err)
		}
	}
	return rows.Err()
}

func (s *Store) Doubt(ctx context.Context, nids []int64) error {
	return s.Writer.Transaction(ctx, func(txn *sql.Tx) error {
		_, err := txn.ExecContext(ctx, doubtTimersSQL+s.Many.Among("timer_nid", "$1"), s.Many.Value(nids))
		return err
	})
}

func (s *Store) Drop(ctx context.Context, nids []int64) error {
	_, err := s.Writer.Remove(ctx, nil, nids, true)
	return err
}

func (s *Store) Delete(ctx context.Context, nids []int64) error {
	_, err := s.Writer.Remove(ctx, nil, nids, false)
	return err
}

func (s *Store) Read(ctx context.Context, nids []int64) ([]*expiration.Timer, error) {
	rows, err := s.Statements.QueryContext(ctx, readTimersSQL+s.Many.Among("t.timer_nid", "$1"), s.Many.Value(nids))
	if err != nil {
		return nil, err
	}
	found := make(map[int64]*expiration.Timer, len(nids))
	var claimed []int64
	if err = each(ctx, rows, func() error {
		t, err := readTimer(rows)
		found[t.NID] = &t
		if t.Claim != nil {
			claimed = append(claimed, t.NID)
		}
		return err
	}); err == nil && len(claimed) > 0 {
		err = s.readClaims(ctx, claimed, found)
	}
	timers := make([]*expiration.Timer, len(nids))
	for i, nid := range nids {
		timers[i] = found[nid]
	}
	return timers, err
}

// readClaims adds the events that are sent to timers that are claimed. A join would do it too, but when many timers run out at
// once its table grows from nothing to thousands of rows within a second, and PostgreSQL goes through all of them each time, as
// it once planned for none.
func (s *Store) readClaims(ctx context.Context, nids []int64, timers map[int64]*expiration.Timer) error {
	rows, err := s.Statements.QueryContext(ctx, readClaimsSQL+s.Many.Among("timer_nid", "$1"), s.Many.Value(nids))
	if err != nil {
		return err
	}
	claims := make(map[int64]expiration.SignedEvent, len(nids))
	err = each(ctx, rows, func() error {
		var (
			nid int64
			e   expiration.SignedEvent
		)
		err := rows.Scan(&nid, &e.EventID, &e.RoomVersion, &e.PDU)
		claims[nid] = e
		return err
	})
	for _, nid := range nids {
		if e, ok := claims[nid]; ok {
			timers[nid].Claim.Event = e
		} else { // deleted meanwhile
			delete(timers, nid)
		}
	}
	return err
}

// Index reads with several connections at once: for a million timers, most of the time goes into taking rows apart.
func (s *Store) Index(ctx context.Context, f func(expiration.Indexed) error) error {
	var first, last int64
	if err := s.DB.QueryRowContext(ctx, selectRangeSQL).Scan(&first, &last); err != nil {
		return err
	}
	var mu sync.Mutex // held while f is called
	readers, ctx := errgroup.WithContext(ctx)
	size := (last-first)/readersAtStart + 1
	for from := first; from <= last; from += size {
		readers.Go(func() error {
			return s.indexRange(ctx, from, min(from+size-1, last), func(batch []expiration.Indexed) error {
				mu.Lock()
				defer mu.Unlock()
				for _, t := range batch {
					if ctx.Err() != nil { // another reader has failed
						return ctx.Err()
					}
					if err := f(t); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	return readers.Wait()
}

// indexRange is Index for a range of numbers, some at a time.
func (s *Store) indexRange(ctx context.Context, first, last int64, f func([]expiration.Indexed) error) error {
	rows, err := s.DB.QueryContext(ctx, selectIndexSQL, first, last)
	if err != nil {
		return err
	}
	var (
		digest             sql.RawBytes
		duration, deadline int64 // milliseconds
		batch              = make([]expiration.Indexed, 0, 256)
	)
	if err = each(ctx, rows, func() error {
		var t expiration.Indexed
		err := rows.Scan(&t.NID, &digest, &t.Claimed, &duration, &deadline)
		copy(t.Digest[:], digest)
		t.Duration, t.Deadline = time.Duration(duration)*time.Millisecond, time.UnixMilli(deadline).UTC()
		if batch = append(batch, t); err == nil && len(batch) == cap(batch) {
			err = f(batch)
			batch = batch[:0]
		}
		return err
	}); err != nil {
		return err
	}
	return f(batch)
}

// Ping implements expiration.Store. A database that can only be read answers every query, and fails every send.
func (s *Store) Ping(ctx context.Context) error {
	var n int
	if err := s.DB.QueryRowContext(ctx, pingSQL).Scan(&n); err != nil {
		return err
	}
	return s.Writer.Ping(ctx)
}

// Close ends all writing, and makes the database whole for whoever copies it afterwards. What comes later fails, and is done at the next
// start. The connections themselves are Dendrite's to close.
func (s *Store) Close() error { return s.Writer.Close() }
