package clientapi

import (
	"testing"
	"time"
)

func BenchmarkRehearsal(b *testing.B) {
	for b.Loop() {
		if err := check("10", state("m.call.member", alice), `{"application":"m.call","call_id":"","m.will_expire":"running"}`, time.Time{}); err != nil {
			b.Fatal(err)
		}
	}
}
