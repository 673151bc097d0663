package expiration

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestBucket(t *testing.T) {
	limit := RateLimit{Threshold: 4, Cooloff: time.Second}
	var b Bucket
	now := time.Minute
	for range 4 {
		require.Zero(t, b.Take(limit, now))
	}
	require.Equal(t, 250*time.Millisecond, b.Take(limit, now))
	require.Equal(t, 250*time.Millisecond, b.Take(limit, now), "a refused request does not make the wait longer")
	require.Zero(t, b.Take(limit, now+250*time.Millisecond))
	require.NotZero(t, b.Take(limit, now+250*time.Millisecond))
	for range 4 {
		require.Zero(t, b.Take(limit, now+time.Hour))
	}
	require.NotZero(t, b.Take(limit, now+time.Hour), "no more than the threshold at once")
	for range 100 {
		require.Zero(t, b.Take(RateLimit{}, now), "no limit")
	}
}

// Requests read the clock before they reach the bucket, and may reach it in another order.
func TestBucketOutOfOrder(t *testing.T) {
	limit := RateLimit{Threshold: 10, Cooloff: time.Second}
	var b Bucket
	allowed := 0
	for i := range 1001 {
		early, late := time.Duration(i)*time.Millisecond, time.Duration(i+50)*time.Millisecond
		for _, at := range []time.Duration{late, early, late, early} {
			if b.Take(limit, at) == 0 {
				allowed++
			}
		}
	}
	require.Equal(t, 20, allowed, "10 at once, and 10 in the second that passes")
}
