package config

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

func TestDefaults(t *testing.T) {
	for _, yaml := range []string{"", "version: 2\n", "expiration:\n", "expiration: {}\n"} {
		c, err := parse([]byte(yaml))
		require.NoError(t, err)
		require.Equal(t, Duration(24*time.Hour), c.MaxDuration)
		require.Equal(t, 100, c.MaxRunningPerUser)
		require.Zero(t, c.RestartGrace)
		require.True(t, c.RateLimiting.Enabled)
		require.Empty(t, c.Database.ConnectionString)
	}
	c, err := parse([]byte("expiration: {rate_limiting: {token: {threshold: 7}}, max_duration: 1h}"))
	require.NoError(t, err)
	require.Equal(t, RateLimit{Threshold: 7, CooloffMS: 1000}, c.RateLimiting.Token, "what is not named keeps its default")
	require.Equal(t, Duration(time.Hour), c.MaxDuration)
}

func TestRateLimitingSwitchedOff(t *testing.T) {
	for _, enabled := range []bool{true, false} {
		c, err := parse(fmt.Appendf(nil, "expiration: {rate_limiting: {enabled: %t, token: {threshold: 7}, unknown_token: {threshold: 8}, user: {threshold: 9}}}", enabled))
		require.NoError(t, err)
		component, routes, calls := c.Components()
		var token, unknown, user expiration.RateLimit
		if enabled {
			token = expiration.RateLimit{Threshold: 7, Cooloff: time.Second}
			unknown = expiration.RateLimit{Threshold: 8, Cooloff: time.Second}
			user = expiration.RateLimit{Threshold: 9, Cooloff: time.Second}
		}
		require.Equal(t, token, component.TokenLimit)
		require.Equal(t, unknown, routes.UnknownTokens)
		require.Equal(t, user, routes.UserRequests)
		require.Equal(t, user, calls.UserRequests)
	}
}
