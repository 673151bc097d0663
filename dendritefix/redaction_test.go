package dendritefix

import (
	"fmt"
	"testing"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"
)

func newEvent(t *testing.T, version gomatrixserverlib.RoomVersion, more string) gomatrixserverlib.PDU {
	t.Helper()
	v, err := gomatrixserverlib.GetRoomVersion(version)
	require.NoError(t, err)
	pdu, err := v.NewEventFromTrustedJSONWithEventID("$event", []byte(fmt.Sprintf(`{"auth_events":[],"depth":5,`+
		`"hashes":{"sha256":"x"},"origin_server_ts":1,"prev_events":[],"room_id":"!room:example.org",`+
		`"sender":"@alice:example.org","signatures":{},%s}`, more)), false)
	require.NoError(t, err)
	return pdu
}

func TestRedactsInContent(t *testing.T) {
	for version := range gomatrixserverlib.RoomVersions() {
		require.Equal(t, version == gomatrixserverlib.RoomVersionV11, RedactsInContent(version), version)
	}
	require.False(t, RedactsInContent("unknown"))
}

func TestUnseenRedaction(t *testing.T) {
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
			require.Equal(t, test.want, UnseenRedaction(newEvent(t, test.version, test.event)))
		})
	}
}
