package dendritefix

import (
	"fmt"
	"strings"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"
)

const testRoom = "!room:example.org"

// callMember returns an event of room version 10.
func callMember(t *testing.T, content string) *types.HeaderedEvent {
	t.Helper()
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersionV10)
	require.NoError(t, err)
	pdu, err := version.NewEventFromTrustedJSON([]byte(fmt.Sprintf(`{"auth_events":[],"content":%s,"depth":5,"hashes":{"sha256":"x"},`+
		`"origin_server_ts":1,"prev_events":[],"room_id":%q,"sender":"@alice:example.org","signatures":{},"type":"m.call.member"}`,
		content, testRoom)), false)
	require.NoError(t, err)
	return &types.HeaderedEvent{PDU: pdu}
}

// deep returns a JSON object with the given number of levels.
func deep(levels int) string {
	return strings.Repeat(`{"a":`, levels) + "1" + strings.Repeat("}", levels)
}
