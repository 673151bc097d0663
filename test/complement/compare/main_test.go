package main

import (
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	before := mustRead(t, `# compiling
{"Action":"start","Package":"a/b"}
{"Action":"run","Package":"a/b","Test":"TestA"}
{"Action":"run","Package":"a/b","Test":"TestA/sub"}
{"Action":"output","Package":"a/b","Test":"TestA/sub","Output":"{\"Action\":\"fail\"}\n"}
{"Action":"pass","Package":"a/b","Test":"TestA/sub"}
{"Action":"pass","Package":"a/b","Test":"TestA"}
{"Action":"run","Package":"a/b","Test":"TestB"}
{"Action":"fail","Package":"a/b","Test":"TestB"}
{"Action":"fail","Package":"a/b"}`)
	after := mustRead(t, `
{"Action":"run","Package":"a/b","Test":"TestA"}
{"Action":"fail","Package":"a/b","Test":"TestA"}
{"Action":"run","Package":"a/b","Test":"TestB"}
{"Action":"pass","Package":"a/b","Test":"TestB"}
{"Action":"run","Package":"a/b","Test":"TestC"}`)

	var out strings.Builder
	if worse := compare(&out, before, after); worse != 2 {
		t.Errorf("%d are worse", worse)
	}
	want := `a/b TestA: pass -> fail
a/b TestA/sub: pass -> absent
a/b TestB: fail -> pass
a/b TestC: absent -> run
fail 1 (1), pass 1 (2) -> fail 1 (1), pass 1 (1), run 1 (1); same result: 0, other: 4, passed before and not now: 2
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
	if worse := compare(&out, before, before); worse != 0 {
		t.Errorf("compared with itself, %d are worse", worse)
	}
}

func mustRead(t *testing.T, json string) results {
	t.Helper()
	r, err := read(strings.NewReader(json))
	if err != nil {
		t.Fatal(err)
	}
	return r
}
