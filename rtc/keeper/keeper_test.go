package keeper

import (
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// Those who are asked in the homeserver.
var (
	_ SFU    = (*livekit.Client)(nil)
	_ Timers = (*expiration.Timers)(nil)
	_ Store  = (*shared.Participants)(nil)
)
