package storage_test

import (
	"cmp"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
)

// participantTests are the tests of shared.Participants.
var participantTests = []test{
	{"RemembersParticipants", remembersParticipants},
	{"MarksWhoIsLeaving", marksWhoIsLeaving},
	{"ForgetsParticipants", forgetsParticipants},
	{"PrunesParticipants", prunesParticipants},
}

// newMember returns a member with a value in every field, different for each n.
func newMember(n int) expiration.Member {
	return expiration.Member{
		Room: fmt.Sprintf("sfu room %d", n), Identity: fmt.Sprintf("identity %d", n), RoomID: fmt.Sprintf("!room%d:example.org", n),
		UserID: fmt.Sprintf("@ü%d:example.org", n), Made: start.Add(time.Duration(n) * time.Minute),
	}
}

// participants returns the participants of a store, and remembers some.
func participants(t *testing.T, store expiration.Store, members ...expiration.Member) *shared.Participants {
	t.Helper()
	p := store.(*shared.Store).Participants()
	for _, m := range members {
		require.NoError(t, p.Remember(t.Context(), m))
	}
	return p
}

// sorted sorts members by identity.
func sorted(t *testing.T, members []expiration.Member, err error) []expiration.Member {
	t.Helper()
	require.NoError(t, err)
	slices.SortFunc(members, func(a, b expiration.Member) int { return cmp.Compare(a.Identity, b.Identity) })
	return members
}

func remembersParticipants(t *testing.T, open func() expiration.Store) {
	ctx := t.Context()
	member, otherRoom, otherUser := newMember(1), newMember(2), newMember(3)
	second := newMember(4)
	second.RoomID, second.UserID = member.RoomID, member.UserID
	otherRoom.UserID, otherUser.RoomID = member.UserID, member.RoomID
	otherUser.Room = member.Room
	participants(t, open(), member, otherRoom, otherUser, second)
	p := participants(t, open())
	got, err := p.MembersOf(ctx, member.RoomID, member.UserID)
	require.Equal(t, []expiration.Member{member, second}, sorted(t, got, err))
	got, err = p.MembersOf(ctx, otherRoom.RoomID, otherUser.UserID)
	require.Empty(t, sorted(t, got, err))
	for _, want := range []expiration.Member{member, otherRoom, otherUser} {
		at, err := p.MemberAt(ctx, want.Room, want.Identity)
		require.NoError(t, err)
		require.Equal(t, want, at)
	}
	_, err = p.MemberAt(ctx, otherRoom.Room, otherUser.Identity)
	require.ErrorIs(t, err, expiration.ErrNotFound)

	member.Made = member.Made.Add(time.Hour)
	require.NoError(t, p.Remember(ctx, member))
	got, err = p.MembersOf(ctx, member.RoomID, member.UserID)
	require.Equal(t, []expiration.Member{member, second}, sorted(t, got, err))
}

func marksWhoIsLeaving(t *testing.T, open func() expiration.Store) {
	ctx := t.Context()
	member, second, otherRoom, otherUser := newMember(1), newMember(2), newMember(3), newMember(4)
	second.RoomID, second.UserID = member.RoomID, member.UserID
	otherRoom.UserID, otherUser.RoomID = member.UserID, member.RoomID
	p := participants(t, open(), member, second, otherRoom, otherUser)
	require.NoError(t, p.MarkLeaving(ctx, otherRoom.RoomID, otherUser.UserID), "nobody")
	require.NoError(t, p.MarkLeaving(ctx, member.RoomID, member.UserID))
	require.NoError(t, p.MarkLeaving(ctx, member.RoomID, member.UserID))
	member.Leaving, second.Leaving = true, true
	p = participants(t, open())
	got, err := p.Leaving(ctx)
	require.Equal(t, []expiration.Member{member, second}, sorted(t, got, err))
	at, err := p.MemberAt(ctx, member.Room, member.Identity)
	require.NoError(t, err)
	require.Equal(t, member, at)

	require.NoError(t, p.Remember(ctx, second), "it has come back")
	got, err = p.Leaving(ctx)
	require.Equal(t, []expiration.Member{member}, sorted(t, got, err))
}

func forgetsParticipants(t *testing.T, open func() expiration.Store) {
	ctx := t.Context()
	member, again := newMember(1), newMember(2)
	p := participants(t, open(), member, again)
	before := again
	again.Made = again.Made.Add(time.Millisecond)
	require.NoError(t, p.Remember(ctx, again))
	for _, m := range []expiration.Member{member, before, newMember(3)} {
		require.NoError(t, p.Forget(ctx, m))
	}
	_, err := p.MemberAt(ctx, member.Room, member.Identity)
	require.ErrorIs(t, err, expiration.ErrNotFound)
	at, err := participants(t, open()).MemberAt(ctx, again.Room, again.Identity)
	require.NoError(t, err)
	require.Equal(t, again, at, "a token was made meanwhile")
}

func prunesParticipants(t *testing.T, open func() expiration.Store) {
	ctx := t.Context()
	p := participants(t, open(), newMember(1), newMember(2), newMember(3))
	leaving := newMember(1)
	require.NoError(t, p.MarkLeaving(ctx, leaving.RoomID, leaving.UserID))
	require.NoError(t, p.Prune(ctx, newMember(3).Made))
	for n, want := range map[int]error{1: nil, 2: expiration.ErrNotFound, 3: nil} {
		_, err := p.MemberAt(ctx, newMember(n).Room, newMember(n).Identity)
		require.ErrorIs(t, err, want)
	}
}
