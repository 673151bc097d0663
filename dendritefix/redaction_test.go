package dendritefix

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

// newEvent returns an event of the test room.
func newEvent(t *testing.T, eventID, sender string, version gomatrixserverlib.RoomVersion, more string) gomatrixserverlib.PDU {
	t.Helper()
	v, err := gomatrixserverlib.GetRoomVersion(version)
	require.NoError(t, err)
	pdu, err := v.NewEventFromTrustedJSONWithEventID(eventID, []byte(fmt.Sprintf(`{"auth_events":[],"depth":5,`+
		`"hashes":{"sha256":"x"},"origin_server_ts":1,"prev_events":[],"room_id":%q,"sender":%q,"signatures":{},%s}`,
		testRoom, sender, more)), false)
	require.NoError(t, err)
	return pdu
}

func TestRedactsInContent(t *testing.T) {
	for version := range gomatrixserverlib.RoomVersions() {
		require.Equal(t, version == gomatrixserverlib.RoomVersionV11, RedactsInContent(version), version)
	}
	require.False(t, RedactsInContent("unknown"))
}

func TestNamedInContent(t *testing.T) {
	const inContent = `"type":"m.room.redaction","content":{"redacts":"$redacted"}`
	for name, test := range map[string]struct {
		version gomatrixserverlib.RoomVersion
		event   string
		want    string
	}{
		"in the content":                  {"11", inContent, "$redacted"},
		"in both places":                  {"11", inContent + `,"redacts":"$redacted"`, ""},
		"Dendrite redacts something else": {"11", inContent + `,"redacts":"$other"`, "$redacted"},
		"in an older room":                {"10", inContent, ""},
		"state":                           {"11", inContent + `,"state_key":""`, ""},
		"another type":                    {"11", `"type":"m.room.message","content":{"redacts":"$redacted"}`, ""},
		"nothing":                         {"11", `"type":"m.room.redaction","content":{}`, ""},
		"no event ID":                     {"11", `"type":"m.room.redaction","content":{"redacts":{"a":1}}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, test.want, namedInContent(newEvent(t, "$event", "@alice:example.org", test.version, test.event)))
		})
	}
}

// redactions is a roomserver with one event and power levels.
type redactions struct {
	events      map[string]*types.HeaderedEvent
	before, now *types.HeaderedEvent // the power levels
	prevUnknown bool
	failed      error
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
		res.StateEvents = []*types.HeaderedEvent{r.before}
	}
	return nil
}

func (r *redactions) QueryCurrentState(_ context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error {
	res.StateEvents = map[gomatrixserverlib.StateKeyTuple]*types.HeaderedEvent{req.StateTuples[0]: r.now}
	return nil
}

func TestUnseenRedaction(t *testing.T) {
	const alice, bob, carol = "@alice:example.org", "@bob:example.org", "@carol:elsewhere"
	event := func(eventID, sender, more string) *types.HeaderedEvent {
		return &types.HeaderedEvent{PDU: newEvent(t, eventID, sender, "11", more)}
	}
	levels := func(of string) *types.HeaderedEvent {
		return event("$levels", alice, `"type":"m.room.power_levels","state_key":"","content":{"redact":50,"users":{"`+of+`":50}}`)
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
			r.events = map[string]*types.HeaderedEvent{
				"$original": event("$original", alice, `"type":"m.room.message","content":{"m.will_expire":"running"}`),
			}
			redaction := event("$redaction", test.by, `"type":"m.room.redaction","content":{"redacts":"`+test.redacts+`"}`)
			redacted, err := UnseenRedaction(t.Context(), &r, redaction.PDU)
			require.ErrorIs(t, err, test.err)
			require.Equal(t, test.want, redacted == "$original", redacted)
		})
	}
}
