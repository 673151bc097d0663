package roomserver

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// at returns an event like e with another depth and time. Its ID differs from that of e.
func at(t *testing.T, e gomatrixserverlib.PDU, depth, ts, content string) gomatrixserverlib.PDU {
	t.Helper()
	version, err := gomatrixserverlib.GetRoomVersion(e.Version())
	require.NoError(t, err)
	json := strings.NewReplacer(`"depth":5`, `"depth":`+depth, `"origin_server_ts":1`, `"origin_server_ts":`+ts,
		`"content":`+string(e.Content()), `"content":`+content, `"sha256":"x"`, `"sha256":"y"`).Replace(string(e.JSON()))
	changed, err := version.NewEventFromTrustedJSON([]byte(json), false)
	require.NoError(t, err)
	return changed
}

// The state that a closing event is built upon decides whether it is sent.
func TestGroundOfAClosingEvent(t *testing.T) {
	const running = `{"m.will_expire":"running"}`
	original := newEvent(t, `,"state_key":"key"`, running).PDU
	redacted := newEvent(t, `,"state_key":"key"`, running).PDU
	redacted.Redact()
	require.Equal(t, original.EventID(), redacted.EventID())
	for name, test := range map[string]struct {
		current gomatrixserverlib.PDU
		drop    expiration.DropReason // or
		is      error
	}{
		"the original":                 {current: original},
		"no state":                     {is: expiration.ErrSetBack},
		"older state":                  {current: at(t, original, "4", "0", running), is: expiration.ErrSetBack},
		"as old, from another branch":  {current: at(t, original, "5", "1", `{}`), is: expiration.ErrSetBack},
		"deeper state, also expiring":  {current: at(t, original, "6", "0", running), drop: expiration.Replaced},
		"later state, without a timer": {current: at(t, original, "5", "2", `{}`), drop: expiration.Replaced},
		"the original, redacted":       {current: redacted, drop: expiration.Redacted},
	} {
		t.Run(name, func(t *testing.T) {
			key := "key"
			e := expiration.Event{ID: original.EventID(), RoomID: "!room:example.org", Type: "m.call.member", StateKey: &key}
			g := newGround(e)
			g.asked, g.current = true, test.current
			err := (&Outbox{}).checkGround(t.Context(), e, original, g)
			var dropped *expiration.DropError
			switch {
			case test.drop != "":
				require.True(t, errors.As(err, &dropped), "%v", err)
				require.Equal(t, test.drop, dropped.Reason)
			default:
				require.ErrorIs(t, err, test.is)
			}
		})
	}
}

// A closing event is later than its original, as long as Dendrite can express the time.
func TestTimeOfAClosingEvent(t *testing.T) {
	original, deadline := newEvent(t, "", `{}`).PDU, time.UnixMilli(50)
	last := dendritefix.MaxTimestamp
	for ts, want := range map[spec.Timestamp]spec.Timestamp{1: 50, 49: 50, 50: 51, last - 1: last, last: last} {
		closing := later(deadline, at(t, original, "5", fmt.Sprint(ts), `{}`))
		require.Equal(t, want, spec.AsTimestamp(closing), ts)
	}
}

// A message has no state below it, so the message itself is looked up again.
func TestGroundOfAClosingMessage(t *testing.T) {
	g := &graph{}
	running := g.add(t, 5, "$a")
	wrapper := NewAPI(g)
	err := NewOutbox(nil, wrapper).checkGround(t.Context(), expiration.Event{ID: running, RoomID: "!room:example.org"}, nil, nil)
	var dropped *expiration.DropError
	require.ErrorAs(t, err, &dropped, "its content does not say that it is running, as after a redaction")
	require.Equal(t, expiration.Redacted, dropped.Reason)
	err = NewOutbox(nil, wrapper).checkGround(t.Context(), expiration.Event{ID: "$unknown", RoomID: "!room:example.org"}, nil, nil)
	require.ErrorIs(t, err, expiration.ErrUnknownEvent)
}
