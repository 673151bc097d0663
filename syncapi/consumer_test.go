package syncapi

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// told is a fake of the engine and the roomserver. It records which membership events are cancelled, and which senders and events are
// dropped. It knows the users of a room with pseudo IDs.
type told struct {
	Roomserver // nil, so other queries panic
	Timers
	cancelled []string
	dropped   []string
	failed    error
	left      []string
	users     map[spec.SenderID]string
	redacted  map[string]expiration.DropReason
}

func (d *told) StateChanged(context.Context, expiration.StateKey, string) error { return nil }

func (d *told) DropSender(_ context.Context, roomID, userID string, before time.Time) {
	d.dropped = append(d.dropped, fmt.Sprint(roomID, userID, before.Unix()))
}

func (d *told) MemberLeft(_ context.Context, roomID, userID string) error {
	d.left = append(d.left, roomID+userID)
	return d.failed
}

func (d *told) CancelState(_ context.Context, s expiration.StateKey, owner string, before time.Time) error {
	d.cancelled = append(d.cancelled, fmt.Sprint(s.RoomID, s.Type, s.Key, owner, before.Unix()))
	return d.failed
}

func (d *told) QueryUserIDForSender(_ context.Context, _ spec.RoomID, id spec.SenderID) (*spec.UserID, error) {
	if userID := d.users[id]; userID != "" {
		return spec.NewUserID(userID, true)
	}
	return spec.NewUserID(string(id), true)
}

// When a user leaves a room, the user's scheduled events about its own membership there are cancelled. Other events are not. The call
// backend, if there is one, learns of it.
func TestMembershipEventsOfWhoIsOut(t *testing.T) {
	const room, alice = "!room:example.org", "@alice:example.org"
	failed := errors.New("disk full")
	for name, test := range map[string]struct {
		eventType, key, membership string
		failed                     error
		want                       []string
	}{
		"left":                {"m.room.member", alice, "leave", nil, []string{room + "m.room.member" + alice + alice + "7"}},
		"banned":              {"m.room.member", alice, "ban", failed, []string{room + "m.room.member" + alice + alice + "7"}},
		"joined":              {"m.room.member", alice, "join", nil, nil},
		"no membership event": {"m.call.member", alice, "leave", nil, nil},
		"pseudo ID": {"m.room.member", "pseudo", "leave", nil, []string{
			room + "m.room.member" + alice + alice + "7", room + "m.room.member" + "pseudo" + alice + "7",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			d := &told{failed: test.failed, users: map[spec.SenderID]string{"pseudo": alice}}
			c := &Consumer{rsAPI: d, timers: d, levels: dendritefix.NewPowerLevels(nil)}
			pdu, err := gomatrixserverlib.MustGetRoomVersion(gomatrixserverlib.RoomVersionV10).NewEventFromTrustedJSON([]byte(fmt.Sprintf(
				`{"auth_events":[],"content":{"membership":%q},"depth":5,"hashes":{"sha256":"x"},"origin_server_ts":1,"prev_events":[],`+
					`"room_id":%q,"sender":%q,"signatures":{},"type":%q,"state_key":%q}`, test.membership, room, alice, test.eventType, test.key,
			)), false)
			require.NoError(t, err)
			err = c.onNewRoomEvent(t.Context(), &api.OutputNewRoomEvent{Event: &types.HeaderedEvent{PDU: pdu}}, time.Unix(7, 0))
			require.ErrorIs(t, err, test.failed)
			require.Equal(t, test.want, d.cancelled)
			require.Equal(t, test.want != nil, d.dropped != nil)
			require.Empty(t, d.left)

			c.members = d
			err = c.onNewRoomEvent(t.Context(), &api.OutputNewRoomEvent{Event: &types.HeaderedEvent{PDU: pdu}}, time.Unix(7, 0))
			require.ErrorIs(t, err, test.failed)
			if test.want != nil {
				require.Equal(t, []string{room + alice}, d.left)
			} else {
				require.Empty(t, d.left)
			}
		})
	}
}

func (d *told) DropEvent(_ context.Context, eventID string, reason expiration.DropReason) {
	d.redacted[eventID] = reason
}

func (d *told) QueryEventsByID(_ context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	for _, eventID := range req.EventIDs {
		res.Events = append(res.Events, inRoom11(eventID, `"type":"m.room.message","content":{"m.will_expire":"running"}`))
	}
	return d.failed
}

func inRoom11(eventID, more string) *types.HeaderedEvent {
	pdu, err := gomatrixserverlib.MustGetRoomVersion(gomatrixserverlib.RoomVersionV11).NewEventFromTrustedJSONWithEventID(
		eventID, []byte(`{"auth_events":[],"depth":5,"hashes":{"sha256":"x"},"origin_server_ts":1,"prev_events":[],"room_id":"!room:example.org",`+
			`"sender":"@alice:example.org","signatures":{},`+more+`}`), false)
	if err != nil {
		panic(err)
	}
	return &types.HeaderedEvent{PDU: pdu}
}

// A redaction that Dendrite does not notice stops the timer of the redacted event. If the look-up fails, the message is redelivered.
func TestUnseenRedactionStopsTheTimer(t *testing.T) {
	redaction := inRoom11("$redaction", `"type":"m.room.redaction","content":{"redacts":"$original"}`)
	d := &told{redacted: map[string]expiration.DropReason{}}
	c := &Consumer{rsAPI: d, timers: d, levels: dendritefix.NewPowerLevels(nil)}
	require.NoError(t, c.onNewRoomEvent(t.Context(), &api.OutputNewRoomEvent{Event: redaction}, time.Now()))
	require.Equal(t, map[string]expiration.DropReason{"$original": expiration.Redacted}, d.redacted)

	clear(d.redacted)
	d.failed = errors.New("the database is away")
	require.ErrorIs(t, c.onNewRoomEvent(t.Context(), &api.OutputNewRoomEvent{Event: redaction}, time.Now()), d.failed)
	require.Empty(t, d.redacted)
}
