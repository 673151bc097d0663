package shared

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// The statements on participants.
const (
	insertParticipantSQL = "INSERT INTO expiration_participants (sfu_room, identity, room_id, user_id, made_ms)" +
		" VALUES ($1, $2, $3, $4, $5) ON CONFLICT (sfu_room, identity) DO UPDATE SET" +
		" room_id = excluded.room_id, user_id = excluded.user_id, made_ms = excluded.made_ms, leaving = FALSE"
	selectParticipantsSQL = "SELECT sfu_room, identity, room_id, user_id, made_ms, leaving FROM expiration_participants WHERE "
	markLeavingSQL        = "UPDATE expiration_participants SET leaving = TRUE WHERE room_id = $1 AND user_id = $2"
	forgetParticipantSQL  = "DELETE FROM expiration_participants WHERE sfu_room = $1 AND identity = $2 AND made_ms = $3"
	pruneParticipantsSQL  = "DELETE FROM expiration_participants WHERE made_ms < $1 AND NOT leaving"
)

// Participants stores for whom the server made tokens of the SFU. A call that returned nil is durable. Times have whole milliseconds.
type Participants struct{ store *Store }

// Participants returns the participants of the database.
func (s *Store) Participants() *Participants { return &Participants{s} }

// Remember stores that a token was made for a member who is joined to the room. The member is not leaving then, whatever was marked before.
func (p *Participants) Remember(ctx context.Context, m expiration.Member) error {
	return p.store.write(ctx, insertParticipantSQL, m.Room, m.Identity, m.RoomID, m.UserID, m.Made.UnixMilli())
}

// MembersOf returns all identities of a user in a Matrix room, in any order.
func (p *Participants) MembersOf(ctx context.Context, roomID, userID string) ([]expiration.Member, error) {
	return p.read(ctx, "room_id = $1 AND user_id = $2", roomID, userID)
}

// MemberAt returns the member behind an identity in a room of the SFU, or expiration.ErrNotFound.
func (p *Participants) MemberAt(ctx context.Context, room, identity string) (m expiration.Member, err error) {
	err = scanMember(p.store.db.QueryRowContext(ctx, selectParticipantsSQL+"sfu_room = $1 AND identity = $2", room, identity), &m)
	if errors.Is(err, sql.ErrNoRows) {
		err = expiration.ErrNotFound
	}
	return m, err
}

// MarkLeaving marks all identities of a user in a Matrix room, until they are forgotten or a new token is made.
func (p *Participants) MarkLeaving(ctx context.Context, roomID, userID string) error {
	return p.store.write(ctx, markLeavingSQL, roomID, userID)
}

// Leaving returns the members who are marked, in any order.
func (p *Participants) Leaving(ctx context.Context) ([]expiration.Member, error) {
	return p.read(ctx, "leaving")
}

// Forget deletes a member, unless another token was made since the member was read.
func (p *Participants) Forget(ctx context.Context, m expiration.Member) error {
	return p.store.write(ctx, forgetParticipantSQL, m.Room, m.Identity, m.Made.UnixMilli())
}

// Prune deletes the members whose last token was made before a time, except for those who are leaving.
func (p *Participants) Prune(ctx context.Context, before time.Time) error {
	return p.store.write(ctx, pruneParticipantsSQL, before.UnixMilli())
}

func (p *Participants) read(ctx context.Context, condition string, args ...any) (members []expiration.Member, err error) {
	rows, err := p.store.db.QueryContext(ctx, selectParticipantsSQL+condition, args...)
	if err != nil {
		return nil, err
	}
	err = each(ctx, rows, func() error {
		var m expiration.Member
		err := scanMember(rows, &m)
		members = append(members, m)
		return err
	})
	return members, err
}

// scanMember reads a row of selectParticipantsSQL.
func scanMember(row interface{ Scan(...any) error }, m *expiration.Member) error {
	var made int64
	err := row.Scan(&m.Room, &m.Identity, &m.RoomID, &m.UserID, &made, &m.Leaving)
	m.Made = time.UnixMilli(made).UTC()
	return err
}
