package roomserver

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// accounts is a server with one account.
type accounts struct {
	deactivated bool
	failed      error
}

func (a accounts) Deactivated(context.Context, string) (bool, error) { return a.deactivated, a.failed }

// membership is a roomserver with one room and one user, who may be in it.
type membership struct {
	journal
	exists, joined bool
	failed         error
	original       *types.HeaderedEvent
	known          *types.HeaderedEvent // and the room's only forward extremity
}

func (m *membership) QueryMembershipForUser(
	_ context.Context, _ *api.QueryMembershipForUserRequest, res *api.QueryMembershipForUserResponse,
) error {
	res.RoomExists, res.IsInRoom = m.exists, m.joined
	return m.failed
}

func (m *membership) QueryEventsByID(_ context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	for _, e := range []*types.HeaderedEvent{m.original, m.known} {
		if e != nil && slices.Contains(req.EventIDs, e.EventID()) {
			res.Events = append(res.Events, e)
		}
	}
	return m.failed
}

func (m *membership) QueryLatestEventsAndState(
	_ context.Context, _ *api.QueryLatestEventsAndStateRequest, res *api.QueryLatestEventsAndStateResponse,
) error {
	if m.known != nil {
		res.LatestEvents = []string{m.known.EventID()}
	}
	return nil
}

func newGuard(m *membership, a accounts) *Guard {
	wrapper := NewAPI(m)
	wrapper.Watch(&m.journal)
	return NewGuard(NewCloser(nil, wrapper), a.Deactivated)
}

// delayedTimer returns the timer of a delayed event of Alice's.
func delayedTimer(eventType string) expiration.Timer {
	return expiration.Timer{
		Event: expiration.Event{
			RoomID: "!room:example.org", Type: eventType, StateKey: new(string), Sender: "@alice:example.org",
		},
		Delayed: &expiration.Delayed{},
	}
}

// No event is built for a deactivated account: with this fake, building one would panic.
func TestGuardLooksAtTheAccount(t *testing.T) {
	failed := errors.New("disk full")
	var dropped *expiration.DropError
	_, err := newGuard(&membership{}, accounts{deactivated: true}).Send(t.Context(), delayedTimer("m.room.message"), expiration.Expired, nil)
	require.ErrorAs(t, err, &dropped)
	require.Equal(t, expiration.Deactivated, dropped.Reason)
	_, err = newGuard(&membership{}, accounts{failed: failed}).Send(t.Context(), delayedTimer("m.room.message"), expiration.Expired, nil)
	require.ErrorIs(t, err, failed)
	require.False(t, errors.As(err, &dropped), "a passing fault")
}

// An event of a deactivated account is finished if the roomserver has it. Otherwise it is not sent.
func TestGuardResubmits(t *testing.T) {
	failed := errors.New("disk full")
	event := newEvent(t, "", `{}`)
	signed := expiration.SignedEvent{EventID: event.EventID(), RoomVersion: "10", PDU: event.JSON()}
	original := &types.HeaderedEvent{PDU: at(t, event, "4", "1", `{"m.will_expire":"running"}`)}
	redacted := &types.HeaderedEvent{PDU: at(t, event, "4", "1", `{"m.will_expire":"running"}`)}
	redacted.Redact()
	closing := delayedTimer("m.call.member")
	closing.Delayed, closing.Event.StateKey, closing.Event.ID = nil, nil, original.EventID()
	for name, test := range map[string]struct {
		timer      expiration.Timer
		roomserver membership
		accounts   accounts
		sent       bool
		reason     expiration.DropReason
		err        error
	}{
		"active":              {delayedTimer("m"), membership{exists: true, joined: true, known: event}, accounts{}, true, "", nil},
		"deactivated":         {delayedTimer("m"), membership{exists: true, joined: true}, accounts{deactivated: true}, false, expiration.Deactivated, nil},
		"sent before":         {delayedTimer("m"), membership{exists: true, known: event}, accounts{deactivated: true}, true, "", nil},
		"not to be found out": {delayedTimer("m"), membership{exists: true, joined: true}, accounts{failed: failed}, false, "", failed},
		"closing event":       {closing, membership{exists: true, joined: true, original: original, known: event}, accounts{deactivated: true}, true, "", nil},
		"redacted":            {closing, membership{exists: true, joined: true, original: redacted}, accounts{}, false, expiration.Redacted, nil},
		"closed, redacted":    {closing, membership{exists: true, joined: true, original: redacted, known: event}, accounts{}, true, "", nil},
		"may be redacted":     {closing, membership{exists: true, joined: true, failed: failed}, accounts{}, false, "", failed},
	} {
		t.Run(name, func(t *testing.T) {
			err := newGuard(&test.roomserver, test.accounts).Resubmit(t.Context(), test.timer, signed)
			require.Equal(t, test.sent, len(test.roomserver.calls) > 0, test.roomserver.calls)
			var dropped *expiration.DropError
			switch {
			case test.err != nil:
				require.ErrorIs(t, err, test.err)
			case test.reason != "":
				require.ErrorAs(t, err, &dropped)
				require.Equal(t, test.reason, dropped.Reason)
			default:
				require.NoError(t, err)
			}
		})
	}
}

// A membership event is sent only while its sender is a member.
func TestGuardLooksAtTheMembership(t *testing.T) {
	failed := errors.New("disk full")
	for name, test := range map[string]struct {
		eventType  string
		roomserver membership
		refused    bool
		gone       bool
		err        error
	}{
		"member":              {"m.room.member", membership{exists: true, joined: true}, false, false, nil},
		"out of the room":     {"m.room.member", membership{exists: true}, true, false, nil},
		"no room":             {"m.room.member", membership{}, false, true, nil},
		"not to be found out": {"m.room.member", membership{failed: failed}, false, false, failed},
		"anything else":       {"m.room.topic", membership{failed: failed}, false, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			err := newGuard(&test.roomserver, accounts{}).checkMember(t.Context(), delayedTimer(test.eventType).Event)
			var refused *expiration.RefusedError
			var dropped *expiration.DropError
			require.Equal(t, test.refused, errors.As(err, &refused), err)
			require.Equal(t, test.gone, errors.As(err, &dropped), err)
			if !test.refused && !test.gone {
				require.ErrorIs(t, err, test.err)
			}
		})
	}
}
