package rtc

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// The form of a request decides about the identity, which clients derive too.
func TestIdentities(t *testing.T) {
	const user = "@alice:a.example"
	room := livekit.RoomName(roomID, slotID)
	for name, test := range map[string]struct {
		body, identity string
	}{
		"Newest":       {`"member_id":"abc"`, livekit.Identity(user, "abc")},
		"Older":        {`"member":{"id":"abc","claimed_device_id":"DEV"}`, livekit.Identity(user, "DEV", "abc")},
		"Both":         {`"member_id":"abc","member":{"id":"x","claimed_device_id":"DEV"}`, livekit.Identity(user, "abc")},
		"Plain":        {`"member_id":"@alice:a.example:DEV"`, "@alice:a.example:DEV"},
		"OlderPlain":   {`"member":{"id":"@alice:a.example:DEV","claimed_device_id":"DEV"}`, livekit.Identity(user, "DEV", "@alice:a.example:DEV")},
		"AnotherUser":  {`"member_id":"@bob:a.example:DEV"`, livekit.Identity(user, "@bob:a.example:DEV")},
		"LongerServer": {`"member_id":"@alice:a.example.com:DEV"`, livekit.Identity(user, "@alice:a.example.com:DEV")},
		"DigitsAlone":  {`"member_id":"@alice:a.example:8448"`, "@alice:a.example:8448"},
		"NotAPort":     {`"member_id":"@alice:a.example:D8448:x"`, "@alice:a.example:D8448:x"},
	} {
		t.Run(name, func(t *testing.T) {
			f := matrixFields([]byte(`{"room_id":"` + roomID + `","slot_id":"` + slotID + `",` + test.body + `}`))
			m := f.member(user)
			require.NoError(t, f.err)
			require.Equal(t, livekit.Participant{Room: room, Identity: test.identity}, m.participant())
		})
	}
}

// A user cannot take the identity of a user of a server on another port of the same machine.
func TestIdentityOfAnotherServer(t *testing.T) {
	other := member{userID: "@alice:a.example:8448", roomID: roomID, slotID: slotID, id: "@alice:a.example:8448:DEV"}
	mine := other
	mine.userID = "@alice:a.example"
	require.Equal(t, other.participant(), mine.participant())
	require.True(t, mine.isAmbiguous())
	require.False(t, other.isAmbiguous())
}

// The key of a member is the same for all forms of a request, and different for different members.
func TestMemberKey(t *testing.T) {
	m := member{userID: "@alice:a.example", roomID: roomID, slotID: slotID, id: "abc"}
	older := m
	older.deviceID = "DEV"
	require.Equal(t, m.key(), older.key())
	for _, change := range []func(*member){
		func(m *member) { m.userID = "x" }, func(m *member) { m.roomID = "x" }, func(m *member) { m.slotID = "x" }, func(m *member) { m.id = "x" },
		func(m *member) { m.slotID, m.id = m.slotID+m.id[:1], m.id[1:] },
	} {
		other := m
		change(&other)
		require.NotEqual(t, m.key(), other.key())
	}
}
