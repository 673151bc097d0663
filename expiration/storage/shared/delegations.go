package shared

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// The statements on delegations.
const (
	// The older delegation of the member goes first, because member_key is unique.
	replaceDelegationSQL = "DELETE FROM expiration_delegations WHERE member_key = $1 AND timer_nid <> $2" +
		" AND EXISTS (SELECT 1 FROM expiration_deadlines WHERE timer_nid = $2 AND outcome IS NULL)"
	insertDelegationSQL = "INSERT INTO expiration_delegations" +
		" (timer_nid, token_hash, member_key, sfu_room, identity, taken_ms, seen_ms, room_sid, phase)" +
		" SELECT t.timer_nid, t.token_hash, $1, $2, $3, $4, $5, $6, $7" + fromTimersSQL + " WHERE t.timer_nid = $8 AND d.outcome IS NULL" +
		" ON CONFLICT (timer_nid) DO UPDATE SET token_hash = excluded.token_hash, member_key = excluded.member_key," +
		" sfu_room = excluded.sfu_room, identity = excluded.identity, taken_ms = excluded.taken_ms, seen_ms = excluded.seen_ms," +
		" room_sid = excluded.room_sid, phase = excluded.phase"
	noteSessionSQL = "UPDATE expiration_delegations SET seen_ms = $1, room_sid = $2, phase = $3 WHERE timer_nid = $4"
	// A delegation whose hash is another one is that of an earlier timer with the same number.
	selectDelegationsSQL = "SELECT k.timer_nid, k.token_hash, t.content IS NOT NULL, t.sender, t.room_id, d.duration_ms," +
		" k.member_key, k.sfu_room, k.identity, k.taken_ms, k.seen_ms, k.room_sid, k.phase" + fromTimersSQL +
		" JOIN expiration_delegations AS k ON k.timer_nid = t.timer_nid AND k.token_hash = t.token_hash WHERE d.outcome IS NULL"
)

func (s *Store) Delegate(ctx context.Context, d expiration.Delegation) (running bool, err error) {
	var memberKey []byte
	if d.MemberKey != [32]byte{} {
		memberKey = d.MemberKey[:]
	}
	err = s.database.Transaction(ctx, func(txn *sql.Tx) error {
		if memberKey != nil {
			if _, err := txn.ExecContext(ctx, replaceDelegationSQL, memberKey, d.NID); err != nil {
				return err
			}
		}
		res, err := txn.ExecContext(ctx, insertDelegationSQL, nullable(memberKey), d.Room, d.Identity,
			d.Taken.UnixMilli(), storedTime(d.Seen), d.RoomSID, string(d.Phase), d.NID)
		if err != nil {
			return err
		}
		n, err := res.RowsAffected()
		running = n == 1
		return err
	})
	return running && err == nil, err
}

func (s *Store) NoteSessions(ctx context.Context, notes []expiration.SessionNote) error {
	return s.database.Transaction(ctx, func(txn *sql.Tx) error {
		for _, n := range notes {
			if _, err := txn.ExecContext(ctx, noteSessionSQL, storedTime(n.Seen), n.RoomSID, string(n.Phase), n.NID); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Store) Delegations(ctx context.Context) (delegations []expiration.Delegation, err error) {
	rows, err := s.db.QueryContext(ctx, selectDelegationsSQL)
	if err != nil {
		return nil, err
	}
	err = each(ctx, rows, func() error {
		var (
			d                     expiration.Delegation
			hash, memberKey       sql.RawBytes
			duration, taken, seen int64 // milliseconds
		)
		if err := rows.Scan(&d.NID, &hash, &d.Delayed, &d.UserID, &d.RoomID, &duration,
			&memberKey, &d.Room, &d.Identity, &taken, &seen, &d.RoomSID, &d.Phase); err != nil {
			return err
		}
		if len(hash) != len(d.Hash) || memberKey != nil && len(memberKey) != len(d.MemberKey) {
			return fmt.Errorf("the delegation of timer %d has hashes of %d and %d bytes", d.NID, len(hash), len(memberKey))
		}
		copy(d.Hash[:], hash)
		copy(d.MemberKey[:], memberKey)
		d.Duration = time.Duration(duration) * time.Millisecond
		d.Taken, d.Seen = time.UnixMilli(taken).UTC(), readTime(seen)
		delegations = append(delegations, d)
		return nil
	})
	return delegations, err
}

// storedTime returns a time in milliseconds, and 0 for none.
func storedTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func readTime(stored int64) time.Time {
	if stored == 0 {
		return time.Time{}
	}
	return time.UnixMilli(stored).UTC()
}
