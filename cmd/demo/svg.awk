# Converts the demo's output to a picture for the README:
#
#   go run ./cmd/demo | awk -f cmd/demo/svg.awk > docs/demo.svg
#
# It leaves out the progress lines, the JSON of the running event, and "unsigned" of the closing one.

/^ +\.\.\. / { next }
/the running event, as/ { skipping = 1; next }
skipping { if (/^$/) skipping = 0; next }
/^      },$/ && !unsigned { held = $0; next }
/^      "unsigned"/ { unsigned = 1; held = ""; add("      }"); next }
unsigned { if (/^      }$/) unsigned = 0; next }
{ if (held != "") { add(held); held = "" } }
/^$/ && (n == 0 || lines[n] == "") { next }
{ add($0) }

function add(text) { lines[++n] = text }

END {
	while (lines[n] == "") n--
	height = 17 * n + 28
	printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 640 %d\" width=\"640\" height=\"%d\">\n", height, height
	print "<title>The output of go run ./cmd/demo</title>"
	print "<rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#161b22\"/>"
	print "<g font-family=\"ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace\" font-size=\"12.5\" fill=\"#c9d1d9\">"
	for (i = 1; i <= n; i++) {
		text = lines[i]
		colour = ""
		if (text ~ /^[A-Za-z]/) colour = " fill=\"#79c0ff\" font-weight=\"bold\""
		else if (text ~ /expired|ended/) colour = " fill=\"#7ee787\""
		else if (text ~ /404/) colour = " fill=\"#ffa657\""
		gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/ /, "\\&#160;", text)
		if (text != "") printf "<text x=\"14\" y=\"%d\"%s>%s</text>\n", 17 * i + 10, colour, text
	}
	print "</g>\n</svg>"
}
