// Package shared implements expiration.Store for both databases. The packages beside it have what differs between SQLite and PostgreSQL:
// the names of types, and how a write is made durable.
//
// A timer is one row in each of three tables. The split keeps the rows small that are written often, or that the start reads:
//
//	expiration_timers     the event, 1 to 2 KB; written once
//	expiration_deadlines  30 bytes; a refresh writes only this row, so a batch of refreshes writes few pages
//	expiration_digests    a digest of the event, which the start reads along with the deadline instead of the event
//
// A timer exists while it has a row in expiration_deadlines, and runs while the outcome in that row is NULL. A timer without a digest is in
// doubt: its event may have been replaced. A claim sets the outcome, and writes the event that will be sent into expiration_claims.
// Finalised delayed events are in expiration_finalised.
//
// A timer that the SFU keeps alive has a row in expiration_delegations too. The participants of the SFU are in expiration_participants, and
// have nothing to do with timers.
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

// In each statement the parameters first appear in the order of their numbers, because SQLite numbers them by first appearance.
const (
	InsertTimerSQL = "INSERT INTO expiration_timers" +
		" (timer_nid, event_id, room_id, event_type, state_key, sender, token_hash, received_ms," +
		" request_hash, room_version, pdu, content, expires_ms, origin_server_ts, service)" +
		" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"
	readTimersSQL = "SELECT " + columns + fromTimersSQL + " WHERE "
	readClaimsSQL = "SELECT timer_nid, event_id, room_version, pdu FROM expiration_claims WHERE "
	// The range is given for each table, because PostgreSQL does not infer the range of one table from that of another.
	selectIndexSQL = "SELECT d.timer_nid, g.digest, d.outcome IS NOT NULL, k.timer_nid IS NOT NULL, d.duration_ms, d.deadline_ms" +
		" FROM expiration_deadlines AS d LEFT JOIN expiration_digests AS g" +
		" ON g.timer_nid = d.timer_nid AND g.timer_nid BETWEEN $1 AND $2 LEFT JOIN expiration_delegations AS k" +
		" ON k.timer_nid = d.timer_nid AND k.timer_nid BETWEEN $1 AND $2 WHERE d.timer_nid BETWEEN $1 AND $2"
	fromTimersSQL  = " FROM expiration_timers AS t JOIN expiration_deadlines AS d ON d.timer_nid = t.timer_nid"
	selectRangeSQL = "SELECT COALESCE(MIN(timer_nid), 1), COALESCE(MAX(timer_nid), 0) FROM expiration_deadlines"
	doubtTimersSQL = "DELETE FROM expiration_digests WHERE "
	pingSQL        = "SELECT COUNT(*) FROM (SELECT 1 FROM expiration_timers LIMIT 1) AS timers"
)

// readersAtStart is how many connections read all timers at the start.
const readersAtStart = 4

// Database is the part of the store that differs between the databases. A write is durable when its method returns.
type Database interface {
	// Among returns the condition that a column has one of many values. The values are one parameter; its argument is the result of Values.
	Among(column, parameter string) string
	Values(slice any) any
	// Transaction calls f once, with a transaction that f must not end.
	Transaction(ctx context.Context, f func(*sql.Tx) error) error
	// Insert adds the rows of a timer. values are the arguments of InsertTimerSQL; the first is the timer's number. Duration and deadline
	// are in milliseconds.
	Insert(ctx context.Context, values []any, d expiration.Digest, duration, deadline int64) error
	// Remove deletes all rows of the timers, or only of those that run if running is set. It returns how many timers it removed. If txn is
	// nil, Remove uses a transaction of its own.
	Remove(ctx context.Context, txn *sql.Tx, nids []int64, running bool) (int64, error)
	// Refresh and Claim change the timers that meet the condition, and call found for each of them.
	Refresh(ctx context.Context, refreshes []expiration.Refresh, found func(nid int64)) error
	Claim(ctx context.Context, claims []expiration.ConditionalClaim, found func(nid int64)) error
	// Ping returns an error if nothing can be written now. It writes nothing.
	Ping(ctx context.Context) error
	// Close makes sure that a copy of the database has all timers. After Close, writes fail.
	Close() error
}

// Store implements expiration.Store.
type Store struct {
	db       *sql.DB
	database Database
	// Frequent queries are prepared once, because planning a query can take longer than reading the rows.
	readTimers, readClaims *sql.Stmt
}

var _ expiration.Store = (*Store)(nil)

// New returns the store of a database. The tables must exist.
func New(db *sql.DB, database Database) (*Store, error) {
	s := &Store{db: db, database: database}
	return s, sqlutil.StatementList{
		{Statement: &s.readTimers, SQL: readTimersSQL + database.Among("t.timer_nid", "$1")},
		{Statement: &s.readClaims, SQL: readClaimsSQL + database.Among("timer_nid", "$1")},
	}.Prepare(db)
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
	return s.database.Insert(ctx, []any{
		t.NID, t.Event.ID, t.Event.RoomID, t.Event.Type, t.Event.StateKey, t.Event.Sender, t.TokenHash[:], t.Received.UnixMilli(),
		nullable(request), roomVersion, nullable(pdu), nullable(delayed.Content), delayed.Expires.Milliseconds(),
		storedTimestamp(delayed.Timestamp), delayed.Service,
	}, d, t.Duration.Milliseconds(), t.Deadline.UnixMilli())
}

// nullable returns NULL for a nil slice. Without it, versions of lib/pq before 1.11, which a Dendrite tree may use, store nil as an empty
// string.
func nullable(data []byte) any {
	if data == nil {
		return nil
	}
	return data
}

func (s *Store) Refresh(ctx context.Context, refreshes []expiration.Refresh) ([]bool, error) {
	return change(ctx, refreshes, func(r expiration.Refresh) int64 { return r.NID }, s.database.Refresh)
}

func (s *Store) Claim(ctx context.Context, claims []expiration.ConditionalClaim) ([]bool, error) {
	return change(ctx, claims, func(c expiration.ConditionalClaim) int64 { return c.NID }, s.database.Claim)
}

// change writes to several timers, and reports for each of them whether it was found.
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
	return s.write(ctx, doubtTimersSQL+s.database.Among("timer_nid", "$1"), s.database.Values(nids))
}

func (s *Store) Drop(ctx context.Context, nids []int64) error {
	_, err := s.database.Remove(ctx, nil, nids, true)
	return err
}

func (s *Store) Delete(ctx context.Context, nids []int64) error {
	_, err := s.database.Remove(ctx, nil, nids, false)
	return err
}

func (s *Store) Read(ctx context.Context, nids []int64) ([]*expiration.Timer, error) {
	rows, err := s.readTimers.QueryContext(ctx, s.database.Values(nids))
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
		err = s.addClaims(ctx, claimed, found)
	}
	timers := make([]*expiration.Timer, len(nids))
	for i, nid := range nids {
		timers[i] = found[nid]
	}
	return timers, err
}

// addClaims adds the events from expiration_claims to claimed timers. A join would be slow on PostgreSQL: when many timers expire at once,
// that table grows from nothing to thousands of rows within a second. A plan made for the empty table then reads all rows each time.
func (s *Store) addClaims(ctx context.Context, nids []int64, timers map[int64]*expiration.Timer) error {
	rows, err := s.readClaims.QueryContext(ctx, s.database.Values(nids))
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

// Index implements expiration.Store. It reads with several connections at once, because decoding the rows of a million timers takes
// longer than reading them.
func (s *Store) Index(ctx context.Context, f func(expiration.Indexed) error) error {
	var first, last int64
	if err := s.db.QueryRowContext(ctx, selectRangeSQL).Scan(&first, &last); err != nil {
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

// indexRange does what Index does for a range of numbers. It calls f with a batch of timers at a time.
func (s *Store) indexRange(ctx context.Context, first, last int64, f func([]expiration.Indexed) error) error {
	rows, err := s.db.QueryContext(ctx, selectIndexSQL, first, last)
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
		err := rows.Scan(&t.NID, &digest, &t.Claimed, &t.Kept, &duration, &deadline)
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

// Ping implements expiration.Store. It makes a query, and checks that the database can be written to. With a read-only database, queries
// succeed but every send fails.
func (s *Store) Ping(ctx context.Context) error {
	var n int
	if err := s.db.QueryRowContext(ctx, pingSQL).Scan(&n); err != nil {
		return err
	}
	return s.database.Ping(ctx)
}

// Close ends all writing, and makes sure that a copy of the database has all timers. Later writes fail; the engine does their work after
// the next start. Dendrite closes the connections.
func (s *Store) Close() error { return s.database.Close() }
