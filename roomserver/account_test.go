package roomserver

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib/spec"
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

func newCheckedOutbox(m *membership, a accounts) *CheckedOutbox {
	wrapper := NewAPI(m)
	wrapper.Watch(&m.journal)
	return NewCheckedOutbox(NewOutbox(nil, wrapper), a.Deactivated)
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
func TestCheckedOutboxLooksAtTheAccount(t *testing.T) {
	failed := errors.New("disk full")
	var dropped *expiration.DropError
	_, err := newCheckedOutbox(&membership{}, accounts{deactivated: true}).Send(t.Context(), delayedTimer("m.room.message"), expiration.Expired, nil)
	require.ErrorAs(t, err, &dropped)
	require.Equal(t, expiration.Deactivated, dropped.Reason)
	_, err = newCheckedOutbox(&membership{}, accounts{failed: failed}).Send(t.Context(), delayedTimer("m.room.message"), expiration.Expired, nil)
	require.ErrorIs(t, err, failed)
	require.False(t, errors.As(err, &dropped), "a passing fault")
}

// An event of a deactivated account is finished if the roomserver has it. Otherwise it is not sent.
func TestCheckedOutboxResubmits(t *testing.T) {
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
			err := newCheckedOutbox(&test.roomserver, test.accounts).Resubmit(t.Context(), test.timer, signed)
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

// A delayed event is sent only while its sender is a member, even if the auth rules would allow it, or if the room has the same state already.
func TestCheckedOutboxLooksAtTheMembership(t *testing.T) {
	failed := errors.New("disk full")
	for name, test := range map[string]struct {
		eventType, key, content string
		membership              string
		failed                  error
		sent, same              bool
	}{
		"member":              {"m.room.topic", "", `{}`, "join", nil, true, false},
		"out of the room":     {"m.room.topic", "", `{}`, "leave", nil, false, false},
		"would rejoin":        {"m.room.member", "@alice:example.org", `{"membership":"join"}`, "leave", nil, false, false},
		"aliases":             {"m.room.aliases", "example.org", `{}`, "leave", nil, false, false},
		"aliases of a member": {"m.room.aliases", "example.org", `{}`, "join", nil, true, false},
		"the same":            {"m.room.member", "@alice:example.org", `{"membership":"join"}`, "join", nil, false, true},
		"the same, banned":    {"m.room.power_levels", "", `{"events_default":0,"state_default":0}`, "ban", nil, false, false},
		"not to be found out": {"m.room.topic", "", `{}`, "join", failed, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := &graph{}
			g.set(t, test.membership, 0)
			g.latest, g.membership.failed = []string{g.add(t, 5, "$a")}, test.failed
			g.state = append(g.state, stateOf(t, spec.MRoomJoinRules, "", `{"join_rule":"public"}`))
			sent := false
			g.input = func(e *types.HeaderedEvent) { sent, g.latest = true, []string{e.EventID()} }
			timer := delayedTimer(test.eventType)
			timer.Event.StateKey, timer.Delayed.Content = &test.key, []byte(test.content)
			_, err := NewCheckedOutbox(g.outbox(), accounts{}.Deactivated).Send(t.Context(), timer, expiration.Expired,
				func(context.Context, expiration.Built) error { return nil })
			require.Equal(t, test.sent, sent)
			switch {
			case test.failed != nil:
				require.ErrorIs(t, err, test.failed)
			case test.sent || test.same:
				require.NoError(t, err)
			default:
				require.ErrorAs(t, err, new(*expiration.RefusedError))
			}
		})
	}
	var dropped *expiration.DropError
	require.ErrorAs(t, newCheckedOutbox(&membership{}, accounts{}).checkMember(t.Context(), delayedTimer("m.room.topic").Event), &dropped)
	require.Equal(t, expiration.RoomGone, dropped.Reason)
}
