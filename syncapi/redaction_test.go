package syncapi

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

const (
	roomID = "!room:localhost"
	alice  = "@alice:localhost"
	bob    = "@bob:localhost"
)

// redactions is a roomserver with one event, and power levels; and the timers.
type redactions struct {
	api.QuerySenderIDAPI
	Timers
	events      map[string]*rstypes.HeaderedEvent
	before, now *rstypes.HeaderedEvent // the power levels
	prevUnknown bool
	failed      error
	dropped     []string
	droppedAs   expiration.DropReason
}

func (r *redactions) QueryUserIDForSender(_ context.Context, _ spec.RoomID, sender spec.SenderID) (*spec.UserID, error) {
	return spec.NewUserID(string(sender), true)
}

func (r *redactions) QueryEventsByID(_ context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	if r.failed != nil {
		return r.failed
	}
	for _, eventID := range req.EventIDs {
		if event := r.events[eventID]; event != nil {
			res.Events = append(res.Events, event)
		}
	}
	return nil
}

func (r *redactions) QueryStateAfterEvents(
	_ context.Context, _ *api.QueryStateAfterEventsRequest, res *api.QueryStateAfterEventsResponse,
) error {
	res.PrevEventsExist = !r.prevUnknown
	if r.before != nil && res.PrevEventsExist {
		res.StateEvents = []*rstypes.HeaderedEvent{r.before}
	}
	return nil
}

func (r *redactions) QueryCurrentState(_ context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error {
	res.StateEvents = map[gomatrixserverlib.StateKeyTuple]*rstypes.HeaderedEvent{req.StateTuples[0]: r.now}
	return nil
}

func (r *redactions) DropEvent(_ context.Context, eventID string, reason expiration.DropReason) {
	r.dropped, r.droppedAs = append(r.dropped, eventID), reason
}

// inRoom11 returns an event of a room of version 11.
func inRoom11(t *testing.T, eventID, sender, more string) *rstypes.HeaderedEvent {
	t.Helper()
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersionV11)
	require.NoError(t, err)
	pdu, err := version.NewEventFromTrustedJSONWithEventID(eventID, []byte(fmt.Sprintf(`{"auth_events":[],"depth":5,`+
		`"hashes":{"sha256":"x"},"origin_server_ts":1,"prev_events":[],"room_id":%q,"sender":%q,"signatures":{},%s}`,
		roomID, sender, more)), false)
	require.NoError(t, err)
	return &rstypes.HeaderedEvent{PDU: pdu}
}

func TestUnseenRedactions(t *testing.T) {
	const carol = "@carol:elsewhere"
	levels := func(of string) *rstypes.HeaderedEvent {
		return inRoom11(t, "$levels", alice, `"type":"m.room.power_levels","state_key":"","content":{"redact":50,"users":{"`+of+`":50}}`)
	}
	away := errors.New("the database is away")
	for name, test := range map[string]struct {
		by      string
		redacts string
		redactions
		want bool
		err  error
	}{
		"by the sender":                            {by: alice, redacts: "$original", want: true},
		"by somebody of the server":                {by: bob, redacts: "$original", want: true},
		"by somebody else":                         {by: carol, redacts: "$original", redactions: redactions{before: levels(bob)}},
		"by a moderator":                           {by: carol, redacts: "$original", redactions: redactions{before: levels(carol)}, want: true},
		"by a moderator who is none now":           {by: carol, redacts: "$original", redactions: redactions{before: levels(carol), now: levels(bob)}, want: true},
		"by a moderator who was none then":         {by: carol, redacts: "$original", redactions: redactions{before: levels(bob), now: levels(carol)}},
		"by a moderator, upon what is not known":   {by: carol, redacts: "$original", redactions: redactions{prevUnknown: true, now: levels(carol)}, want: true},
		"in a room without power levels":           {by: carol, redacts: "$original"},
		"of an event that is not known":            {by: alice, redacts: "$unknown"},
		"while the database is away, tried again":  {by: alice, redacts: "$original", redactions: redactions{failed: away}, err: away},
		"of itself, which the roomserver does not": {by: alice, redacts: "$redaction"},
	} {
		t.Run(name, func(t *testing.T) {
			r := test.redactions
			r.events = map[string]*rstypes.HeaderedEvent{
				"$original": inRoom11(t, "$original", alice, `"type":"m.room.message","content":{"m.will_expire":"running"}`),
			}
			c := &Consumer{rsAPI: &r, timers: &r, levels: dendritefix.NewPowerLevels(&r)}
			err := c.onNewRoomEvent(t.Context(), &api.OutputNewRoomEvent{
				Event: inRoom11(t, "$redaction", test.by, `"type":"m.room.redaction","content":{"redacts":"`+test.redacts+`"}`),
			}, time.Now())
			require.ErrorIs(t, err, test.err)
			if !test.want {
				require.Empty(t, r.dropped)
				return
			}
			require.Equal(t, []string{"$original"}, r.dropped)
			require.Equal(t, expiration.Redacted, r.droppedAs)
		})
	}
}
